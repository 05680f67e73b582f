"""Times to the first token: how programs measure them side by side, and one file that several of them write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cakekv.bench.bound import compute_curve
from cakekv.bench.grid import check_grid, fill
from cakekv.bench.link import ShapedLink
from cakekv.bench.servers import valkey_behind
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.errors import CakeError
from cakekv.restore.report import RestoreReport

Result = TypeVar("Result")


class Linked(NamedTuple):
    """A model, a prompt, and a server to store it on."""

    loaded: Cake
    """Has no store."""
    prompt: list[int]
    url: str
    set_bandwidth: Callable[[float | None], None] | None
    """Changes the link's, in bytes per second; None: there is no link."""
    settings: dict[str, Any]
    """What is written down beside results."""


@contextmanager
def prompt_behind_link(model: str, dtype: str, prefix: int, suffix_tokens: int, has_link: bool) -> Iterator[Linked]:
    """Valkey behind a shaped link, while the `with` block lasts, and the demo's document as a prompt.

    Parameters
    ----------
    model, dtype : str
        As for `load_cake`.
    prefix, suffix_tokens : int
        Lengths of what will be stored, and of what stands behind it.
    has_link : bool
        Whether there is a link, which needs root.
    """
    loaded = load_cake(model, None, dtype=dtype)
    token_ids = [int(token) for token in loaded.tokenizer(read_document("demo", loaded.tokenizer))["input_ids"]]
    check_grid(loaded.engine, len(token_ids), [prefix], suffix_tokens, loaded.chunk_tokens)
    loaded.prefill(token_ids[:512], mode="compute")  # the first forward of a process is slow
    settings = {
        "model": model,
        "dtype": loaded.engine.identity(loaded.chunk_tokens).dtype,
        "chunk_tokens": loaded.chunk_tokens,
        "suffix_tokens": suffix_tokens,
        "link": "two network namespaces, shaped by tc tbf" if has_link else "none",
    }
    with ExitStack() as stack:
        link = stack.enter_context(ShapedLink()) if has_link else None
        url = stack.enter_context(valkey_behind(link))
        yield Linked(loaded, token_ids[: prefix + suffix_tokens], url, link.set_bandwidth if link else None, settings)


def stored(cake: Cake, prompt: Sequence[int], prefix: int) -> RestoreReport:
    """Store the prefix of a prompt, and load it.

    Raises
    ------
    CakeError
        It could not be stored, or not be loaded.
    """
    fill(cake, prompt[:prefix])
    report = cake.prefill(prompt, mode="load", save=False).report
    if report.loaded_tokens < prefix:
        raise CakeError(f"only {report.loaded_tokens} of {prefix} tokens were loaded: {report.miss_reasons()}")
    return report


def restore(cake: Cake, prompt: Sequence[int]) -> RestoreReport:
    """Restore a prompt from both ends; nothing is saved."""
    return cake.prefill(prompt, mode="both", save=False).report


def balanced_bandwidth(cake: Cake, prompt: Sequence[int], loaded: RestoreReport) -> float:
    """Bytes per second with which loading a prefix, as `stored` did, takes as long as computing it."""
    alone = cake.prefill(prompt, mode="compute", save=False).report
    return sum(loaded.bytes_by_tier.values()) / compute_curve(alone.spans).at(loaded.prefix_tokens)


def in_turns(ways: Mapping[str, Callable[[], Result]], repeats: int, taught: int = 1) -> dict[str, list[Result]]:
    """Run every way so many times, in rounds, forwards and backwards; `taught` rounds before them teach the costs."""
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for number in range(repeats + taught):
        for name in reversed(list(ways)) if number % 2 else ways:
            found[name].append(ways[name]())
    return {name: results[taught:] for name, results in found.items()}


def write_ttft(file: Path, engine: str, points: Sequence[dict[str, Any]]) -> None:
    """Put points into a file's list `ttft`, instead of those of that engine; all else in it stays."""
    data = json.loads(file.read_text()) if file.exists() else {}
    kept = [one for one in data.get("ttft", ()) if one["engine"] != engine]
    write_json(file, {**data, "ttft": [*kept, *points]})
