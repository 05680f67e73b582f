"""TTFT from chunks that a method made smaller as they were stored, beside raw and int8 ones. Linux, as root.

    sudo .venv/bin/python benchmarks/compress_ttft.py --json benchmarks/compress.json
    python benchmarks/compress_ttft.py --json out/compress.json --tiny     # to try the program; needs no root

Valkey on the far side of a shaped link, as in network.py, holds the prefix once for every way to store it. The balanced
bandwidth is that at which loading the raw prefix takes as long as computing it. The ways take turns, forwards and
backwards; the first round teaches the costs.

The file's list `ttft` is written anew; all else in the file stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.ttft import balanced_bandwidth, in_turns, prompt_behind_link, restore, stored, write_ttft
from cakekv.cake import Cake
from cakekv.cli.console import number_list
from cakekv.errors import CakeError
from cakekv.restore.report import RestoreReport
from cakekv.store.opening import open_store

ENGINE, RAW = "embedded", "raw"
WAYS = (RAW, "int8", "raw+key_norm:share=0.5", "int8+key_norm:share=0.5")


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "bfloat16",
    way: Annotated[
        list[str] | None, typer.Option(help='Beside raw: a codec, or "CODEC+METHOD" that acts at store; repeatable.')
    ] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Length of the stored prefix, in tokens.")] = 4096,
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, at every bandwidth.")] = 5,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 32,
    tiny: Annotated[bool, typer.Option("--tiny", help="A short prefix, one round, no link.")] = False,
) -> None:
    """Measure TTFT with chunks that are stored without all of their rows."""
    if tiny:
        prefix, repeats = 512, 1
    multiples: list[float] = number_list(ratios, float, "ratios")
    ways = list(dict.fromkeys((RAW, *(way or WAYS))))
    with prompt_behind_link(model, dtype, prefix, suffix_tokens, not tiny) as linked:
        loaded, prompt, url, set_bandwidth, settings = linked
        points = measure(loaded, url, prompt, prefix, ways, multiples, repeats, set_bandwidth)
    write_ttft(json_file, ENGINE, [{**point, **settings, **describe_run()} for point in points])
    for point in points:
        print(described(point), flush=True)


def measure(
    loaded: Cake,
    url: str,
    prompt: Sequence[int],
    prefix: int,
    ways: Sequence[str],
    multiples: Sequence[float],
    repeats: int,
    set_bandwidth: Callable[[float | None], None] | None = None,
) -> list[dict[str, Any]]:
    """Restore a prompt that is stored in several ways, in turn, at every bandwidth.

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
    ways : sequence of str
        A codec, or "CODEC+METHOD"; the first is what the others are compared with.
    multiples : sequence of float
        Bandwidths, in multiples of that at which loading the first way's prefix takes as long as computing it.
    repeats : int
        Rounds that count.
    set_bandwidth : callable or None
        Changes the link's, in bytes per second; None: nothing is limited.

    Returns
    -------
    list of dict
        By bandwidth and way, with medians and every round.

    Raises
    ------
    CakeError
        The prefix could not be stored, or not be loaded.
    """
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    with ExitStack() as stack:
        cakes, found = {}, {}
        for number, way in enumerate(ways):
            codec, _, method = way.partition("+")
            store = stack.enter_context(open_store(f"{url}?prefix=way{number}:&pack=no&timeout=60s"))
            cakes[way] = stack.enter_context(
                Cake(loaded.engine, None, store, codec=codec, compress=method or None, **options)
            )
            found[way] = stored(cakes[way], prompt, prefix)
        balanced = balanced_bandwidth(cakes[ways[0]], prompt, found[ways[0]])
        points: list[dict[str, Any]] = []
        for multiple in multiples:
            if set_bandwidth is not None:
                set_bandwidth(multiple * balanced)
            runs = in_turns({way: partial(restore, cakes[way], prompt) for way in ways}, repeats)
            first = median(report.ttft_s for report in runs[ways[0]])
            for way in ways:
                point = _point(way, found[way], runs[way], first)
                at = {"bandwidth_ratio": multiple, "bandwidth_bytes_per_s": multiple * balanced}
                points.append(point | (at if set_bandwidth else dict.fromkeys(at)))
    return points


def _point(way: str, loaded: RestoreReport, runs: Sequence[RestoreReport], first: float) -> dict[str, Any]:
    ttft_s = median(report.ttft_s for report in runs)
    return {
        "engine": ENGINE,
        "method": way,
        "prefix_tokens": loaded.prefix_tokens,
        "ttft_s": ttft_s,
        "ratio": ttft_s / first,
        "stored_bytes": sum(loaded.bytes_by_tier.values()),
        "kept_share": loaded.kept_share,
        "repeats": {
            "ttft_s": [report.ttft_s for report in runs],
            "loaded_tokens": [report.loaded_tokens for report in runs],
        },
    }


def described(point: dict[str, Any]) -> str:
    """In words."""
    words = f"{point['method']}, {point['prefix_tokens']:,} tokens in {point['stored_bytes']:,} bytes"
    words += f": {point['ttft_s']:.3f} s, {point['ratio']:.3f} of {RAW}"
    ratio = point["bandwidth_ratio"]
    return words if ratio is None else f"{words}, at {ratio:g} × balanced bandwidth"


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
