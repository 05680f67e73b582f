"""TTFT of a prefix that is read only as queries ask for it, beside one that is computed and loaded. Linux, as root.

    sudo .venv/bin/python benchmarks/recall_ttft.py --json benchmarks/decode.json
    python benchmarks/recall_ttft.py --json out/decode.json --tiny     # to try the program; needs no root

Valkey on the far side of a shaped link, as in network.py, holds the prefix once, with clusters beside its chunks. The
balanced bandwidth is that at which loading the prefix takes as long as computing it. The ways take turns, forwards and
backwards; the first two rounds teach the costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from cakekv.bench.systems import Claim, write_systems
from cakekv.bench.ttft import balanced_bandwidth, in_turns, prompt_behind_link
from cakekv.cake import Cake
from cakekv.cli.console import number_list
from cakekv.errors import CakeError
from cakekv.restore.options import Mode
from cakekv.restore.report import RestoreReport
from cakekv.store.opening import open_store

CLUSTERS = "tokens=32,span=1024,lazy=yes"
WHOLE = "whole"
WAYS = {
    "budget=256": f"clusterkv:budget=256,{CLUSTERS}",
    "budget=256,average=yes": f"clusterkv:budget=256,average=yes,{CLUSTERS}",
}
TAUGHT = 2
"""Rounds that do not count."""


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results in here, beside those of others.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "float32",
    prefix: Annotated[int, typer.Option(help="Length of the stored prefix, a multiple of 1,024 tokens.")] = 4096,
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, at every bandwidth.")] = 3,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 16,
    tiny: Annotated[bool, typer.Option("--tiny", help="A short prefix, one round, no link.")] = False,
) -> None:
    """Measure TTFT and bytes of a prefix of which a first token reads what its queries select."""
    if tiny:
        prefix, repeats = 1024, 1
    multiples: list[float] = number_list(ratios, float, "ratios")
    with prompt_behind_link(model, dtype, prefix, suffix_tokens, not tiny) as linked:
        loaded, prompt, url, set_bandwidth, settings = linked
        claims = measure(loaded, url, prompt, prefix, multiples, repeats, set_bandwidth)
    settings |= {"prefix_tokens": prefix, "clusters": CLUSTERS}
    write_systems(json_file, "clusterkv lazy ttft", claims, settings)
    for claim in claims:
        print(claim.name, claim.measured, flush=True)


def measure(
    loaded: Cake,
    url: str,
    prompt: Sequence[int],
    prefix: int,
    multiples: Sequence[float],
    repeats: int,
    set_bandwidth: Callable[[float | None], None] | None = None,
    ways: Mapping[str, str] = WAYS,
) -> list[Claim]:
    """Restore a prompt in several ways, in turn, at every bandwidth.

    Parameters
    ----------
    loaded : Cake
        Whose engine and whose chunks' and spans' lengths are taken.
    url : str
        Of an empty server.
    prompt : sequence of int
        Prefix and suffix.
    prefix : int
        How much of it is stored.
    multiples : sequence of float
        Bandwidths, in multiples of that at which loading the prefix takes as long as computing it.
    repeats : int
        Rounds that count.
    set_bandwidth : callable or None
        Changes the link's, in bytes per second; None: nothing is limited.
    ways : mapping of str to str
        Sights, by what they are called; what they have beside chunks is the same.

    Raises
    ------
    CakeError
        The prefix could not be stored.
    """
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    with ExitStack() as stack:
        cakes = {}
        for way, sight in {WHOLE: None, **ways}.items():
            store = stack.enter_context(open_store(f"{url}?pack=no&timeout=60s"))
            cakes[way] = stack.enter_context(Cake(loaded.engine, None, store, decode=sight, **options))
        first = cakes[next(iter(ways))]
        first.prefill(prompt, mode="compute")
        saved = first.wait_saved()
        if saved.failed_chunks:
            raise CakeError(f"the prefix could not be stored: {saved.error}")
        balanced = balanced_bandwidth(
            cakes[WHOLE], prompt, cakes[WHOLE].prefill(prompt, mode="load", save=False).report
        )
        claims = []
        for multiple in multiples:
            if set_bandwidth is not None:
                set_bandwidth(multiple * balanced)
            turns = {way: partial(_report, cake, prompt, _modes()) for way, cake in cakes.items()}
            runs = in_turns(turns, repeats, TAUGHT)
            claims += [_claim(way, multiple, runs) for way in ways]
    return claims


def _modes() -> Iterator[Mode]:
    return chain(repeat("both", TAUGHT), repeat("auto"))


def _report(cake: Cake, prompt: Sequence[int], modes: Iterator[Mode]) -> RestoreReport:
    """Restore a prompt in the next mode, and wait for all of it."""
    prefill = cake.prefill(prompt, mode=next(modes), save=False)
    if prefill.recall is not None:
        prefill.recall.settle()
    return prefill.report


def _claim(way: str, multiple: float, runs: Mapping[str, list[RestoreReport]]) -> Claim:
    own, whole = runs[way], runs[WHOLE]
    ttft_s, whole_s = (median(report.ttft_s for report in reports) for reports in (own, whole))
    first = median(report.first_read_bytes for report in own)
    measured = {
        "bandwidth_ratio": multiple,
        "ttft_s": ttft_s,
        "whole_ttft_s": whole_s,
        "ratio": ttft_s / whole_s,
        "first_read_bytes": first,
        "whole_read_bytes": median(sum(report.bytes_by_tier.values()) for report in whole),
        "recalled_tokens": [report.recalled_tokens for report in own],
        "repeats": {"ttft_s": [one.ttft_s for one in own], "whole_ttft_s": [one.ttft_s for one in whole]},
    }
    claim = "the first token comes sooner than if the prefix is computed from the front and loaded from the back"
    return Claim(f"clusterkv lazy ttft: {way} at {multiple:g} times balance", claim, measured, ttft_s < whole_s)


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
