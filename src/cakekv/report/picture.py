"""Pictures of a restore: the two frontiers over time, and where they meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cakekv.errors import CakeError
from cakekv.report.colours import COMPUTE, FAILED, LOAD, MODES, WASTED
from cakekv.restore.report import LoadRecord, RestoreReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT = "#333333"
INK: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4}


def frontier_picture(reports: Mapping[str, RestoreReport], path: Path, title: str | None = None) -> None:
    """Draw one restore in full, and others beside it as lines.

    The vertical axis is the prompt. Compute rises from below, loads come down from above; every span and every load is
    a bar from when it began to when it ended.

    Parameters
    ----------
    reports : mapping of str to RestoreReport
        By mode. Drawn in full is "both" or "auto" if it is among them, else the first.
    path : Path
        The PNG.
    title : str or None
        Stands above the picture.

    Raises
    ------
    CakeError
        The picture cannot be written, or matplotlib is not installed.
    """
    main = next((mode for mode in ("both", "auto") if mode in reports), next(iter(reports)))
    report = reports[main]
    figure, axes = new_figure(1, 1, 9.0, 5.2)
    ax: Axes = axes[0]
    _draw_arms(ax, report)
    for mode, other in reports.items():
        if mode != main:
            _draw_line(ax, mode, other)
    longest_s = max(other.ttft_s for other in reports.values())
    for mode, other in reports.items():
        ax.axvline(other.ttft_s, color=MODES.get(mode, TEXT), linewidth=1.2, linestyle="-" if mode == main else ":")
    levels = _label_times(ax, reports, longest_s)
    if report.met_at is not None and 0 < report.met_at < report.prefix_tokens:
        _mark_meeting(ax, report)
    ax.set_xlim(0, longest_s * 1.04)
    ax.set_ylim(0, report.prompt_tokens)
    ax.set_xlabel("seconds since the request")
    ax.set_ylabel("position in the prompt (tokens)")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    if title:
        ax.set_title(title, loc="left", fontweight="bold", pad=8 + 13 * levels)
    _legend(ax, report)
    save_figure(figure, path)


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure, in inches, that needs no display, and its axes, row by row.

    Raises
    ------
    CakeError
        matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CakeError("pictures need matplotlib: pip install 'cakekv[pictures]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(WASTED)
        ax.tick_params(colors=TEXT)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG.

    Raises
    ------
    CakeError
        It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise CakeError(f"cannot write the picture {path}: {error}") from error


def _draw_arms(ax: Axes, report: RestoreReport) -> None:
    for span in report.spans:
        ax.barh(span.start, span.ended_s - span.began_s, span.tokens, span.began_s, align="edge", color=COMPUTE, **INK)
    for colour, loads in _by_colour(report.loads):
        ax.barh(
            [load.start for load in loads],
            [load.ended_s - load.began_s for load in loads],
            [load.tokens for load in loads],
            [load.began_s for load in loads],
            align="edge",
            color=colour,
            **INK,
        )
    # What is covered stays covered: the area that each arm has won.
    end_s = report.ttft_s
    for span in report.spans:
        ax.barh(span.start, end_s - span.ended_s, span.tokens, span.ended_s, align="edge", color=COMPUTE, alpha=0.13)
    for load in report.loads:
        if load.outcome == "placed":
            ax.barh(load.start, end_s - load.ended_s, load.tokens, load.ended_s, align="edge", color=LOAD, alpha=0.13)


def _by_colour(loads: Iterable[LoadRecord]) -> Iterable[tuple[str, list[LoadRecord]]]:
    groups: dict[str, list[LoadRecord]] = {}
    for load in loads:
        groups.setdefault(_load_colour(load), []).append(load)
    return groups.items()


def _load_colour(load: LoadRecord) -> str:
    return {"placed": LOAD, "overtaken": WASTED, "moved": WASTED}.get(load.outcome, FAILED)


def _draw_line(ax: Axes, mode: str, report: RestoreReport) -> None:
    """The frontier of an arm that worked alone."""
    points = report.frontiers
    times = [point.time_s for point in points]
    frontier = [point.back if report.loaded_tokens else point.front for point in points]
    ax.plot(times, frontier, color=MODES.get(mode, TEXT), linewidth=1.4, linestyle=(0, (4, 2)))


def _label_times(ax: Axes, reports: Mapping[str, RestoreReport], longest_s: float) -> int:
    """TTFTs above the plot, higher where they would touch; returns how many lines they take."""
    previous = -longest_s
    height = highest = 0
    for mode, report in sorted(reports.items(), key=lambda item: item[1].ttft_s):
        height = height + 1 if report.ttft_s - previous < 0.2 * longest_s else 0
        highest = max(highest, height)
        previous = report.ttft_s
        ax.annotate(
            f"{mode} {report.ttft_s:.2f} s",
            (report.ttft_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 13 * height),
            textcoords="offset points",
            ha="center" if report.ttft_s < 0.93 * longest_s else "right",
            color=MODES.get(mode, TEXT),
            fontweight="bold",
            fontsize=9,
        )
    return highest + 1


def _mark_meeting(ax: Axes, report: RestoreReport) -> None:
    assert report.met_at is not None
    met_s = max(
        [span.ended_s for span in report.spans if span.start < report.met_at]
        + [load.ended_s for load in report.loads if load.outcome == "placed" and load.start == report.met_at]
    )
    ax.plot(met_s, report.met_at, "o", color="white", markeredgecolor=TEXT, markersize=7, zorder=5)
    ax.annotate(
        f"met at {report.met_at:,}",
        (met_s, report.met_at),
        # The middle of the triangle between the arms, where nothing is drawn.
        xytext=(met_s / 3, (report.prefix_tokens + report.met_at) / 3),
        ha="center",
        va="center",
        color=TEXT,
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": TEXT, "linewidth": 0.8, "shrinkB": 4},
    )


def _legend(ax: Axes, report: RestoreReport) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=COMPUTE, label=f"computed: {report.computed_tokens:,} tokens"),
        Patch(color=LOAD, label=f"loaded: {report.loaded_tokens:,} tokens"),
    ]
    colours = {_load_colour(load) for load in report.loads}
    if WASTED in colours:
        handles.append(Patch(color=WASTED, label="load overtaken by compute"))
    if FAILED in colours:
        handles.append(Patch(color=FAILED, label="load failed"))
    ax.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
