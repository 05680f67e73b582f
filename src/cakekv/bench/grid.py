"""Measures the modes side by side, over prefix lengths and bandwidths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cakekv.bench.bound import clairvoyant_bound, compute_curve
from cakekv.cake import Cake
from cakekv.engine.base import Engine
from cakekv.errors import BadInput, CakeError
from cakekv.restore.planner import Mode
from cakekv.restore.report import RestoreReport
from cakekv.store.disk import DiskStore
from cakekv.store.throttled import ThrottledStore

ARMS: tuple[Mode, ...] = ("compute", "load", "both")


@dataclass
class Point:
    """One prefix at one bandwidth; `math.inf` (null in JSON) for a tier without a link before it.

    Attributes
    ----------
    prefix_tokens : int
        Length of the stored prefix.
    bandwidth_ratio : float
        Bandwidth over that at which loading the prefix takes as long as computing it.
    bandwidth : float
        Bytes per second.
    modes : tuple of str
        What is measured, in turn: "compute" and "load", then those that are compared with them.
    runs : dict
        Per mode, the report of each repeat.
    bounds : list of float
        The clairvoyant bound of each repeat, in seconds.
    """

    prefix_tokens: int
    bandwidth_ratio: float
    bandwidth: float
    modes: tuple[Mode, ...] = ARMS
    runs: dict[str, list[RestoreReport]] = field(default_factory=lambda: defaultdict(list))
    bounds: list[float] = field(default_factory=list)

    def measure(self, cake: Cake, token_ids: Sequence[int], on_run: Callable[[Mode], None]) -> None:
        """Run every mode once, one after the other, and tell the bound from the two arms alone.

        Parameters
        ----------
        cake : Cake
            With a store that holds the prefix.
        token_ids : sequence of int
            The prompt: prefix and suffix.
        on_run : callable
            Called with each mode before it is run.

        Raises
        ------
        CakeError
            A chunk could not be loaded, so that no bound can be told.
        """
        for mode in self.modes:
            on_run(mode)
            self.runs[mode].append(cake.prefill(token_ids, mode=mode, save=False).report)
        loaded = self.runs["load"][-1]
        suffix_s = sum(span.ended_s - span.began_s for span in loaded.spans)
        bound = clairvoyant_bound(self.runs["compute"][-1].spans, loaded.loads, self.prefix_tokens, suffix_s)
        self.bounds.append(bound.seconds)

    def seconds(self, mode: str) -> float:
        """Median TTFT of a mode."""
        return median(report.ttft_s for report in self.runs[mode])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: medians, what follows from them, and every repeat."""
        bound_s = median(self.bounds)
        better_s = min(self.seconds("compute"), self.seconds("load"))
        compared = [mode for mode in self.modes if mode not in ("compute", "load")]
        both = self.runs["both"]
        return {
            "prefix_tokens": self.prefix_tokens,
            "bandwidth_ratio": _finite(self.bandwidth_ratio),
            "bandwidth_bytes_per_s": _finite(self.bandwidth),
            **{f"{mode}_s": self.seconds(mode) for mode in self.modes},
            "bound_s": bound_s,
            **{f"{mode}_of_bound": bound_s / self.seconds(mode) for mode in compared},
            **{f"{mode}_of_better": better_s / self.seconds(mode) for mode in compared},
            "repeats": {
                **{f"{mode}_s": [report.ttft_s for report in self.runs[mode]] for mode in self.modes},
                "bound_s": self.bounds,
                "met_at": [report.met_at for report in both],
                "computed_tokens": [report.computed_tokens for report in both],
                "loaded_tokens": [report.loaded_tokens for report in both],
                "wasted_tokens": [report.wasted_tokens for report in both],
            },
        }


def check_grid(engine: Engine[Any, Any], tokens: int, prefixes: Sequence[int], suffix: int, chunk_tokens: int) -> None:
    """Refuse a grid that cannot be measured, before hours are spent on half of it.

    Parameters
    ----------
    engine : Engine
        The model.
    tokens : int
        Length of the document.
    prefixes : sequence of int
        Prefix lengths, in tokens.
    suffix : int
        Tokens after the prefix.
    chunk_tokens : int
        Tokens per chunk.

    Raises
    ------
    BadInput
        A prefix is not a multiple of the chunk, or a prompt is longer than the document or the model's context.
    """
    for prefix in prefixes:
        if prefix < chunk_tokens or prefix % chunk_tokens:
            raise BadInput(f"a prefix of {prefix} tokens is not a multiple of the chunk's {chunk_tokens}")
        if prefix + suffix > tokens:
            raise BadInput(f"a prompt of {prefix} + {suffix} tokens is longer than the document, which has {tokens}")
        if prefix + suffix > engine.max_context:
            raise BadInput(
                f"a prompt of {prefix} + {suffix} tokens is longer than the model's context of {engine.max_context}"
            )


def measure_prefix(
    engine: Engine[Any, Any],
    token_ids: Sequence[int],
    prefix_tokens: int,
    ratios: Sequence[float],
    repeats: int,
    folder: Path,
    on_run: Callable[[str], None],
    *,
    chunk_tokens: int = 64,
    max_span_tokens: int = 512,
) -> list[Point]:
    """Measure the three modes in turn, at every bandwidth, several times.

    Parameters
    ----------
    engine : Engine
        The model.
    token_ids : sequence of int
        The prompt: prefix and suffix.
    prefix_tokens : int
        How much of it is stored.
    ratios : sequence of float
        Bandwidths, as multiples of the balanced one.
    repeats : int
        Runs of every mode at every bandwidth. One after another they go through the bandwidths and, within those,
        through the modes, so that what else the machine does meets all of them.
    folder : Path
        For the store: a new folder on the disk that is to be measured.
    on_run : callable
        Told, in words, what is run next; called `runs_per_prefix` times.
    chunk_tokens, max_span_tokens : int
        As in `Cake`.

    Raises
    ------
    CakeError
        The prefix could not be stored.
    """
    with DiskStore(folder) as disk:
        link = ThrottledStore(disk, math.inf)
        with Cake(engine, None, link, chunk_tokens=chunk_tokens, max_span_tokens=max_span_tokens) as cake:
            return measure_points(cake, link.set_bandwidth, token_ids, prefix_tokens, ratios, repeats, on_run)


def measure_points(
    cake: Cake,
    set_bandwidth: Callable[[float], None],
    token_ids: Sequence[int],
    prefix_tokens: int,
    ratios: Sequence[float],
    repeats: int,
    on_run: Callable[[str], None],
) -> list[Point]:
    """As `measure_prefix`, over any link.

    Parameters
    ----------
    cake : Cake
        Fresh, with an empty store behind the link, which has no limit yet.
    set_bandwidth : callable
        Changes the link's bandwidth, in bytes per second.
    """
    on_run("filling the store")
    stored_bytes = fill(cake, token_ids[:prefix_tokens])
    on_run("finding the balanced bandwidth")
    alone = cake.prefill(token_ids, mode="compute", save=False).report
    balanced = stored_bytes / compute_curve(alone.spans).at(prefix_tokens)
    points = [Point(prefix_tokens, ratio, ratio * balanced) for ratio in ratios]
    for _ in range(repeats):
        for point in points:
            set_bandwidth(point.bandwidth)

            def on_mode(mode: Mode, ratio: float = point.bandwidth_ratio) -> None:
                on_run(f"{ratio:g} × balanced bandwidth, {mode}")

            point.measure(cake, token_ids, on_mode)
    return points


def fill(cake: Cake, prefix_ids: Sequence[int]) -> int:
    """Store a prefix of whole chunks in the empty store of a fresh `Cake`; returns the bytes it takes.

    Raises
    ------
    CakeError
        Not all of it was stored.
    """
    cake.prefill(prefix_ids, mode="compute")
    saved = cake.wait_saved()
    if saved.saved_chunks * cake.chunk_tokens != len(prefix_ids):
        raise CakeError(f"only {saved.saved_chunks} chunks were stored: {saved.error or 'the tier declined'}")
    return saved.saved_bytes


def runs_per_prefix(ratios: Sequence[float], repeats: int) -> int:
    """How many prefills `measure_prefix` runs."""
    return 2 + repeats * len(ratios) * len(ARMS)


def _finite(number: float) -> float | None:
    """The number, or None for infinity, which JSON does not have."""
    return number if math.isfinite(number) else None
