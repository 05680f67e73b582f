"""TTFT of a prompt whose documents are stored, and stand anywhere in it, beside computing it. Linux, as root.

    sudo .venv/bin/python benchmarks/reuse_ttft.py --json benchmarks/reuse.json
    python benchmarks/reuse_ttft.py --json out/reuse.json --tiny     # to try the program; needs no root

The prompt is a few words, then six documents of 512 tokens, then a question: no document is a prefix. Valkey on the far
side of a shaped link, as in network.py, holds what each document is by itself. The bandwidth is the balanced one, at
which loading all documents takes as long as computing them. Computing and every way of reuse take turns, forwards and
backwards; the first round teaches the costs.

The file's list `ttft` gets an entry for each way, instead of those it had of this engine; all else in the file stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.bound import compute_curve
from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_run
from cakekv.bench.quality.documents import make_documents
from cakekv.bench.servers import valkey_behind
from cakekv.bench.ttft import in_turns, write_ttft
from cakekv.cake import Cake
from cakekv.cli.model import load_cake
from cakekv.errors import CakeError
from cakekv.prompt import Document, ids_of
from cakekv.restore.report import RestoreReport
from cakekv.store.base import Store
from cakekv.store.opening import open_store

ENGINE, COMPUTING = "embedded", "computing"
WAYS = ("epic:link=16", "blend:recompute=0.15", "turned")
TARGETS = {"epic:link=16": 0.6}
"""Of the time of computing everything, at most."""
BEGINNING = "Answer from these documents.\n\n"


class Asked(NamedTuple):
    """A prompt's parts, in token ids."""

    beginning: list[int]
    documents: list[list[int]]
    question: list[int]

    @property
    def parts(self) -> list[Any]:
        """As `Cake` takes them."""
        return [self.beginning, *map(Document, self.documents), self.question]


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "auto",
    way: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 6,
    tokens: Annotated[int, typer.Option(min=256, help="Of each.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two short documents, one round, no link.")] = False,
) -> None:
    """Measure how soon a prompt of stored documents is ready."""
    if tiny:
        documents, tokens, repeats = 2, 256, 1
    loaded = load_cake(model, None, dtype=dtype)
    asked = prompt_of(loaded.tokenizer, documents, tokens)
    loaded.prefill(asked.documents[0], mode="compute")  # the first forward of a process is slow
    with ExitStack() as stack:
        link = None if tiny else stack.enter_context(ShapedLink())
        url = stack.enter_context(valkey_behind(link))
        store = stack.enter_context(open_store(f"{url}?timeout=60s"))
        points = measure(loaded, store, asked, way or WAYS, repeats, link.set_bandwidth if link else None)
    settings = {
        "documents": documents,
        "tokens": tokens,
        "question_tokens": len(asked.question),
        "model": model,
        "dtype": loaded.engine.identity(loaded.chunk_tokens).dtype,
        "link": "two network namespaces, shaped by tc tbf" if link else "none",
    }
    write_ttft(json_file, ENGINE, [{**point, **settings, **describe_run()} for point in points])
    for point in points:
        print(described(point), flush=True)


def prompt_of(tokenizer: Any, documents: int, tokens: int) -> Asked:
    """Documents of the judge's, and a question about a fact in the first one."""
    made = make_documents(tokenizer, documents, tokens, 1)
    needle = made[0].needles[0]
    return Asked(ids_of(tokenizer, BEGINNING), [one.context for one in made], list(needle.question))


def measure(
    loaded: Cake,
    store: Store,
    asked: Asked,
    ways: Sequence[str],
    repeats: int,
    set_bandwidth: Callable[[float | None], None] | None = None,
) -> list[dict[str, Any]]:
    """Compute a prompt, and reuse its documents in several ways, in turn.

    Parameters
    ----------
    loaded : Cake
        Whose engine and whose chunks' and spans' lengths are taken.
    store : Store
        Empty.
    asked : Asked
        The prompt.
    ways : sequence of str
        As `cakekv.reuse.reuse_named` reads them.
    repeats : int
        Rounds that count.
    set_bandwidth : callable or None
        Changes the link's, in bytes per second; None: nothing is limited.

    Returns
    -------
    list of dict
        By way, with medians and every round.

    Raises
    ------
    CakeError
        Documents could not be stored, or not be loaded.
    """
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    parts, held = asked.parts, sum(map(len, asked.documents))
    with ExitStack() as stack:
        cakes = {
            way: stack.enter_context(Cake(loaded.engine, None, store, reuse=way, learn=False, **options))
            for way in ways
        }
        plain = stack.enter_context(Cake(loaded.engine, None, None, **options))
        learner = stack.enter_context(Cake(loaded.engine, None, store, reuse="turned", learn=False, **options))
        for document in asked.documents:
            learner.learn(Document(document))
        learner.wait_saved()
        stored = learner.prefill(parts, mode="load", save=False).report
        if stored.reused_tokens < held:
            raise CakeError(f"only {stored.reused_tokens} of {held} tokens were loaded: {stored.miss_reasons()}")
        curve = compute_curve(plain.prefill(parts, mode="compute").report.spans)
        begin = len(asked.beginning)
        balanced = sum(stored.bytes_by_tier.values()) / (curve.at(begin + held) - curve.at(begin))
        if set_bandwidth is not None:
            set_bandwidth(balanced)
        turns: dict[str, Callable[[], RestoreReport]] = {
            way: partial(_reused, cake, parts) for way, cake in cakes.items()
        }
        runs = in_turns({COMPUTING: lambda: plain.prefill(parts, mode="compute").report, **turns}, repeats)
    bandwidth = balanced if set_bandwidth else None
    return [_point(way, runs[COMPUTING], runs[way], bandwidth) for way in ways]


def _reused(cake: Cake, parts: Sequence[Any]) -> RestoreReport:
    return cake.prefill(parts, save=False).report


def _point(
    way: str, computed: Sequence[RestoreReport], reused: Sequence[RestoreReport], bandwidth: float | None
) -> dict[str, Any]:
    compute_s, reuse_s = (median(report.ttft_s for report in reports) for reports in (computed, reused))
    return {
        "engine": ENGINE,
        "method": way,
        "compute_s": compute_s,
        "reuse_s": reuse_s,
        "ratio": reuse_s / compute_s,
        "prompt_tokens": reused[0].prompt_tokens,
        "bandwidth_bytes_per_s": bandwidth,
        "repeats": {
            "compute_s": [report.ttft_s for report in computed],
            "reuse_s": [report.ttft_s for report in reused],
            "reused_tokens": [report.reused_tokens for report in reused],
            "recomputed_tokens": [report.linked_tokens + report.blended_tokens for report in reused],
        },
    }


def described(point: dict[str, Any]) -> str:
    """In words."""
    words = f"{point['method']}: computing {point['compute_s']:.3f} s, reusing {point['reuse_s']:.3f} s"
    words += f", {point['ratio']:.3f} of it"
    if (target := TARGETS.get(point["method"])) is None:
        return words
    return f"{words}; target {'met' if point['ratio'] <= target else 'missed'} ({target:.2f})"


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
