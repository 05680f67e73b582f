"""A picture of a bench: TTFT over bandwidth, one panel per prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cakekv.report.colours import BOTH, BOUND, COMPUTE, LOAD
from cakekv.report.picture import new_figure, save_figure


class Line(NamedTuple):
    """How one of the things that were measured is drawn."""

    name: str
    """What it is called in the points: there, `name_s` is its time."""
    label: str
    marker: str
    colour: str


MODES = (Line("compute", "compute", "s", COMPUTE), Line("load", "load", "^", LOAD), Line("both", "both", "o", BOTH))


def bench_picture(points: Sequence[dict[str, Any]], path: Path, lines: Sequence[Line] = MODES) -> None:
    """Draw the points of a bench as a PNG.

    Parameters
    ----------
    points : sequence of dict
        As `Point.to_dict` makes them; the bound may be missing.
    path : Path
        The PNG.
    lines : sequence of Line
        What was measured.

    Raises
    ------
    CakeError
        It cannot be written, or matplotlib is not installed.
    """
    prefixes = sorted({point["prefix_tokens"] for point in points})
    columns = min(2, len(prefixes))
    rows = -(-len(prefixes) // columns)
    figure, axes = new_figure(rows, columns, 4.8 * columns, 3.4 * rows + 0.5)
    for ax, prefix in zip(axes, prefixes, strict=False):
        _panel(ax, prefix, sorted((p for p in points if p["prefix_tokens"] == prefix), key=_ratio), lines)
    for ax in axes[len(prefixes) :]:
        ax.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False)
    save_figure(figure, path)


def _panel(ax: Any, prefix: int, points: Sequence[dict[str, Any]], lines: Sequence[Line]) -> None:
    ratios = [point["bandwidth_ratio"] for point in points]
    for line in lines:
        medians = [point[f"{line.name}_s"] for point in points]
        spread = [point["repeats"][f"{line.name}_s"] for point in points]
        low, high = [min(runs) for runs in spread], [max(runs) for runs in spread]
        ax.fill_between(ratios, low, high, color=line.colour, alpha=0.15, linewidth=0)
        ax.plot(ratios, medians, marker=line.marker, markersize=5, color=line.colour, label=line.label)
    if all("bound_s" in point for point in points):
        bounds = [point["bound_s"] for point in points]
        ax.plot(ratios, bounds, color=BOUND, linestyle=(0, (4, 2)), linewidth=1.2, label="clairvoyant bound")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ratios, [f"{ratio:g}×" for ratio in ratios])
    # Logarithmic both ways, the same ratio is the same distance everywhere.
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(axis="y", color="#eeeeee")
    ax.set_title(f"prefix of {prefix:,} tokens", loc="left", fontsize=10, fontweight="bold")
    ax.set_xlabel("bandwidth, in multiples of the balanced one")
    ax.set_ylabel("TTFT (s)")


def _ratio(point: dict[str, Any]) -> float:
    return float(point["bandwidth_ratio"])
