"""When an answer is drafted, is sure, and is five tokens long, drafting before all is loaded and after. Linux, as root.

    sudo .venv/bin/python benchmarks/quantspec_ttft.py --json benchmarks/decode.json
    python benchmarks/quantspec_ttft.py --json out/decode.json --tiny     # to try the program; needs no root

Valkey on the far side of a shaped link, as in network.py, holds the prefix once, in both halves. The bandwidth is the
balanced one, at which loading both halves takes as long as computing the prefix. *patient* waits for all of it; *hasty*
drafts from the upper halves while the lower ones are read. They take turns, forwards and backwards; the first round
teaches the costs. Nothing else should run.

The file's list `systems` gets claims whose names begin with `quantspec ttft`; all else in it stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.systems import Claim, write_systems
from cakekv.bench.ttft import balanced_bandwidth, in_turns, prompt_behind_link, stored
from cakekv.cake import Cake
from cakekv.errors import CakeError
from cakekv.store.opening import open_store

NAME = "quantspec ttft"
CODEC = "two_plane"
TARGETS = {"patient": float("inf"), "hasty": 0.0}
"""Of the time to first token: one that allows for both halves, and one that does not."""
TOKENS = 5


class Answered(NamedTuple):
    """One answer; seconds since it was asked for."""

    draft_s: float
    """When drafting could begin: in the first one, when the first token was there."""
    first_s: float
    """When the first token was sure."""
    fifth_s: float
    loaded_tokens: int
    token_ids: tuple[int, ...]


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here, beside those of other systems.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "bfloat16",
    prefix: Annotated[int, typer.Option(min=1, help="Length of the stored prefix, in tokens.")] = 4096,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens to draft.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 32,
    tiny: Annotated[bool, typer.Option("--tiny", help="A short prefix, one round, no link.")] = False,
) -> None:
    """Measure drafting before all is loaded."""
    if tiny:
        prefix, repeats = 512, 1
    with prompt_behind_link(model, dtype, prefix, suffix_tokens, not tiny) as linked:
        loaded, prompt, url, set_bandwidth, settings = linked
        engine: Any = loaded.engine
        engine.stop_tokens = frozenset()  # the answer has as many tokens as are asked for
        runs, bandwidth = measure(loaded, url, prompt, prefix, gamma, repeats, set_bandwidth)
    settings |= {"codec": CODEC, "gamma": gamma, "prefix_tokens": prefix, "bandwidth_bytes_per_s": bandwidth}
    found = claims(runs)
    write_systems(json_file, NAME, found, settings)
    for claim in found:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.measured}")


def measure(
    loaded: Cake,
    url: str,
    prompt: Sequence[int],
    prefix: int,
    gamma: int,
    repeats: int,
    set_bandwidth: Callable[[float | None], None] | None = None,
) -> tuple[dict[str, list[Answered]], float | None]:
    """Answer a prompt, patiently and hastily, in turn.

    Parameters
    ----------
    loaded : Cake
        Whose engine, tokenizer and whose chunks' and spans' lengths are taken.
    url : str
        Of an empty server.
    prompt : sequence of int
        Prefix and suffix.
    prefix : int
        How much of it is stored.
    gamma : int
        Tokens to draft.
    repeats : int
        Rounds that count.
    set_bandwidth : callable or None
        Changes the link's, in bytes per second; None: nothing is limited.

    Returns
    -------
    dict
        Every round's answer, by way.
    float or None
        Bytes per second, if they were limited.

    Raises
    ------
    CakeError
        The prefix could not be stored, or not be loaded.
    """
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    options |= {"codec": CODEC, "save_answers": False}
    with ExitStack() as stack:
        store = stack.enter_context(open_store(f"{url}?pack=no&timeout=60s"))
        filler = stack.enter_context(Cake(loaded.engine, None, store, **options))
        bandwidth = balanced_bandwidth(filler, prompt, stored(filler, prompt, prefix))
        if set_bandwidth is not None:
            set_bandwidth(bandwidth)
        decode = f"quantspec:gamma={gamma}"
        cakes = {
            way: stack.enter_context(
                Cake(loaded.engine, loaded.tokenizer, store, decode=decode, ttft_target_s=target, **options)
            )
            for way, target in TARGETS.items()
        }
        runs = in_turns({way: partial(answer, cake, prompt) for way, cake in cakes.items()}, repeats)
    return runs, bandwidth if set_bandwidth else None


def answer(cake: Cake, prompt: Sequence[int]) -> Answered:
    """Ask for a few tokens."""
    began = monotonic()
    said = cake.generate(prompt, save=False, max_new_tokens=TOKENS)
    took, report = monotonic() - began, said.report
    return Answered(report.draft_s or report.ttft_s, report.ttft_s, took, report.loaded_tokens, tuple(said.token_ids))


def claims(runs: Mapping[str, Sequence[Answered]]) -> list[Claim]:
    """What is gained, and what is not."""
    seconds = {
        way: {name: median(getattr(one, name) for one in ones) for name in ("draft_s", "first_s", "fifth_s")}
        for way, ones in runs.items()
    }
    patient, hasty = (seconds[way] for way in TARGETS)
    rounds = {way: [one._asdict() for one in ones] for way, ones in runs.items()}
    texts = {one.token_ids for ones in runs.values() for one in ones}
    return [
        Claim(
            f"{NAME}: drafting",
            "At balance, drafting begins sooner than the first token is there if all is loaded first",
            {**seconds, "repeats": rounds},
            hasty["draft_s"] < patient["first_s"],
        ),
        Claim(
            f"{NAME}: fifth token",
            "The fifth token is there sooner",
            {"patient": patient["fifth_s"], "hasty": hasty["fifth_s"], "answers": len(texts)},
            hasty["fifth_s"] < patient["fifth_s"],
        ),
    ]


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
