"""A picture of what codecs cost and what they do to answers: bytes per token against agreement and divergence."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cakekv.report.colours import WASTED
from cakekv.report.picture import TEXT, new_figure, save_figure

# Okabe and Ito's colours, which most people tell apart; every codec has a marker of its own besides.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^vDP<>Xp*h8"


class Measured(NamedTuple):
    """What is shown of a recipe on a model."""

    bytes_per_token: float
    agreement: float
    kl: float


def beaten_by(recipe: str, measured: Mapping[str, Measured]) -> list[str]:
    """The recipes that take no more bytes, and are nearer to the exact cache in agreement and divergence."""
    mine = measured[recipe]
    return [
        name
        for name, other in measured.items()
        if other.bytes_per_token <= mine.bytes_per_token and other.kl < mine.kl and other.agreement >= mine.agreement
    ]


def frontier(points: Collection[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (bytes, loss), those than which none has both less, by their bytes."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def quality_picture(models: Mapping[str, Mapping[str, Measured]], path: Path) -> None:
    """Draw a row of two panels per model as a PNG.

    Parameters
    ----------
    models : mapping of str to mapping of str to Measured
        By model, by recipe.
    path : Path
        The PNG.

    Raises
    ------
    CakeError
        It cannot be written, or matplotlib is not installed.
    """
    figure, axes = new_figure(len(models), 2, 13.0, 4.6 * len(models))
    codecs = list(dict.fromkeys(_codec(recipe) for measured in models.values() for recipe in measured))
    for row, (title, measured) in enumerate(models.items()):
        for ax, column in zip(axes[2 * row : 2 * row + 2], ("agreement", "kl"), strict=True):
            _panel(ax, measured, column, codecs)
            ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.canvas.draw()  # places labels by what has been laid out
    figure.set_layout_engine("none")
    for row, measured in enumerate(models.values()):
        for ax, column in zip(axes[2 * row : 2 * row + 2], ("agreement", "kl"), strict=True):
            label(ax, {recipe: (one.bytes_per_token, getattr(one, column)) for recipe, one in measured.items()})
    save_figure(figure, path)


def _codec(recipe: str) -> str:
    return recipe.partition(":")[0]


def _panel(ax: Any, measured: Mapping[str, Measured], column: str, codecs: Sequence[str]) -> None:
    sign = -1 if column == "agreement" else 1
    best = frontier([(one.bytes_per_token, sign * getattr(one, column)) for one in measured.values()])
    ax.plot([x for x, _ in best], [sign * y for _, y in best], color=WASTED, linewidth=1.2, zorder=1)
    for recipe, one in measured.items():
        ax.plot(one.bytes_per_token, getattr(one, column), **marker(codecs.index(_codec(recipe))))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.margins(x=0.12, y=0.12)
    if column == "kl":
        ax.set_yscale("log")
    ax.minorticks_off()
    ax.grid(color="#eeeeee")
    ax.set_xlabel("bytes per token of a bfloat16 cache")
    ax.set_ylabel("agreement (more is better)" if column == "agreement" else "KL divergence, nats (less is better)")


def marker(number: int) -> dict[str, Any]:
    """How a point of the codec, or whatever it is, with this number looks."""
    style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
    return style | {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 3}


def label(ax: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Name each point beside it, where the name covers neither a point nor another name."""
    from matplotlib.transforms import Bbox

    renderer, frame = ax.figure.canvas.get_renderer(), ax.get_window_extent()
    at = {recipe: ax.transData.transform(point) for recipe, point in points.items()}
    size = 5 * ax.figure.dpi / 72
    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in at.values()]
    for recipe, (x, y) in sorted(at.items(), key=lambda item: item[1][1]):
        text = ax.annotate(
            recipe,
            points[recipe],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=TEXT,
            va="center",
            arrowprops={"arrowstyle": "-", "color": WASTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            zorder=4,
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        best = None
        for distance in (1.0, 2.0, 3.0, 4.5, 6.0):
            for right, up in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)):
                left = x + right * distance * 1.4 * size - (0 if right > 0 else width if right < 0 else width / 2)
                box = Bbox.from_bounds(left, y + up * distance * 1.6 * size - height / 2, width, height)
                covered = sum(_overlap(box, other) for other in taken)
                outside = width * height - _overlap(box, frame)
                cost = covered + 4 * outside + distance
                if best is None or cost < best[0]:
                    best = cost, box
        assert best is not None
        taken.append(best[1])
        scale = 72 / ax.figure.dpi
        text.set_position(((best[1].x0 - x) * scale, ((best[1].y0 + best[1].y1) / 2 - y) * scale))


def _overlap(one: Any, other: Any) -> float:
    """The area that two boxes share."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, wide) * max(0.0, high))
