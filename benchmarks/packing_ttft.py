"""TTFT from packed chunks beside TTFT from raw ones, both arms at work, in one run. Linux, as root.

    sudo .venv/bin/python benchmarks/packing_ttft.py --json benchmarks/packing_ttft.json

Network: Valkey on the far side of a shaped link, as in network.py, holds the prefix twice, raw (`pack=no`) and packed
(`pack=yes`). The balanced bandwidth is that at which loading the raw prefix takes as long as computing it; bandwidths
are multiples of it. Disk: this machine's own, as fast as it is, raw beside what `pack=auto` makes of it once another
prompt has been saved and loaded, so that it is known how fast the disk is read.

Rounds of raw and packed take turns at who is first. The first round at each bandwidth teaches the costs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from cakekv.bench.grid import check_grid
from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_run
from cakekv.bench.servers import valkey_behind
from cakekv.bench.ttft import balanced_bandwidth, in_turns, restore, stored
from cakekv.cake import Cake
from cakekv.cli.console import number_list, write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.errors import CakeError
from cakekv.restore.report import RestoreReport
from cakekv.store.opening import open_store

AT_BALANCE, ON_DISK = 0.85, 1.02
"""Targets: at most this share of the raw form's time to first token."""
FORMS = ("raw", "packed")


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto.")] = "bfloat16",
    prefixes: Annotated[str, typer.Option(help="Lengths of the stored prefix, in tokens.")] = "1024,4096",
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")] = "0.5,1,2",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, at every bandwidth.")] = 5,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 32,
    folder: Annotated[Path | None, typer.Option(help="Keep the disk tier in here.")] = None,
) -> None:
    """Measure TTFT with packed and with raw chunks."""
    lengths: list[int] = number_list(prefixes, int, "prefix lengths")
    multiples: list[float] = number_list(ratios, float, "ratios")
    loaded = load_cake(model, None, dtype=dtype)
    token_ids = [int(token) for token in loaded.tokenizer(read_document("demo", loaded.tokenizer))["input_ids"]]
    check_grid(loaded.engine, len(token_ids), lengths, suffix_tokens, loaded.chunk_tokens)
    loaded.prefill(token_ids[:512], mode="compute")  # the first forward of a process is slow
    data: dict[str, Any] = {
        **describe_run(),
        "model": model,
        "dtype": loaded.engine.identity(loaded.chunk_tokens).dtype,
        "link": "two network namespaces, shaped by tc tbf",
        "suffix_tokens": suffix_tokens,
        "chunk_tokens": loaded.chunk_tokens,
        "points": [],
    }

    def add(tier: str, prefix: int, points: Sequence[dict[str, Any]]) -> None:
        for point in points:
            data["points"].append({"tier": tier, "prefix_tokens": prefix, **point})
            print(_described(data["points"][-1]), flush=True)
        write_json(json_file, data)

    with ShapedLink() as link, valkey_behind(link) as url:
        for prefix in lengths:
            link.set_bandwidth(None)
            urls = {"raw": f"{url}?prefix=raw{prefix}:&pack=no", "packed": f"{url}?prefix=packed{prefix}:&pack=yes"}
            urls = {form: f"{place}&timeout=60s" for form, place in urls.items()}
            prompt = token_ids[: prefix + suffix_tokens]
            add("valkey", prefix, measure(loaded, urls, prompt, prefix, multiples, repeats, link.set_bandwidth))
    for prefix in lengths:
        with tempfile.TemporaryDirectory(prefix="cakekv-packing-", dir=folder) as scratch:
            urls = {"raw": f"file://{scratch}/raw?pack=no", "packed": f"file://{scratch}/auto?pack=auto"}
            add("disk", prefix, measure(loaded, urls, token_ids[: prefix + suffix_tokens], prefix, [None], repeats))


def measure(
    loaded: Cake,
    urls: dict[str, str],
    prompt: Sequence[int],
    prefix: int,
    multiples: Sequence[float | None],
    repeats: int,
    set_bandwidth: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Restore a prompt from either form at every bandwidth (None: no limit), in turn.

    Parameters
    ----------
    loaded : Cake
        Whose engine and whose chunks' and spans' lengths are taken.
    urls : dict
        The empty store of each of `FORMS`.
    prompt : sequence of int
        Prefix and suffix.
    prefix : int
        How much of it is stored.
    multiples : sequence of float or None
        Bandwidths, in multiples of that at which loading the raw prefix takes as long as computing it.
    repeats : int
        Rounds that count.
    set_bandwidth : callable or None
        Changes the link's, in bytes per second.

    Raises
    ------
    CakeError
        The prefix could not be stored, or not be loaded.
    """
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    with ExitStack() as stack:
        cakes, found = {}, {}
        for form in FORMS:
            store = stack.enter_context(open_store(urls[form]))
            with Cake(loaded.engine, None, store, **options) as other:
                stored(other, prompt[::-1], prefix)
            cakes[form] = stack.enter_context(Cake(loaded.engine, None, store, **options))
            found[form] = stored(cakes[form], prompt, prefix)
        balanced = balanced_bandwidth(cakes["raw"], prompt, found["raw"])
        sizes = {form: sum(report.bytes_by_tier.values()) for form, report in found.items()}
        points = []
        for multiple in multiples:
            if set_bandwidth is not None and multiple is not None:
                set_bandwidth(multiple * balanced)
            runs = in_turns({form: partial(restore, cakes[form], prompt) for form in FORMS}, repeats)
            points.append(_point(multiple, balanced, runs, sizes))
    return points


def _point(
    multiple: float | None, balanced: float, runs: dict[str, list[RestoreReport]], stored: dict[str, int]
) -> dict[str, Any]:
    seconds = {form: median(report.ttft_s for report in reports) for form, reports in runs.items()}
    return {
        "bandwidth_ratio": multiple,
        "bandwidth_bytes_per_s": None if multiple is None else multiple * balanced,
        **{f"{form}_s": seconds[form] for form in FORMS},
        "packed_of_raw": seconds["packed"] / seconds["raw"],
        **{f"{form}_bytes": stored[form] for form in FORMS},
        "repeats": {
            **{f"{form}_s": [report.ttft_s for report in runs[form]] for form in FORMS},
            **{f"{form}_loaded_tokens": [report.loaded_tokens for report in runs[form]] for form in FORMS},
        },
    }


def _described(point: dict[str, Any]) -> str:
    multiple, share = point["bandwidth_ratio"], point["packed_of_raw"]
    words = f"{point['tier']}, {point['prefix_tokens']:,} tokens"
    words += "" if multiple is None else f", {multiple:g} × balanced bandwidth"
    words += f": raw {point['raw_s']:.3f} s, packed {point['packed_s']:.3f} s, {share:.3f} of it"
    target = ON_DISK if multiple is None else AT_BALANCE if multiple == 1 else None
    if target is None:
        return words
    return f"{words}; target {'met' if share <= target else 'missed'} ({target:.2f})"


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
