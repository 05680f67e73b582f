"""A picture of what methods keep and what it costs: kept share against divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cakekv.bench.quality.picture import label, marker
from cakekv.report.picture import new_figure, save_figure


def compress_picture(studies: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a panel per study as a PNG.

    Parameters
    ----------
    studies : mapping of str to mapping
        As `CompressResults.to_dict` has them.
    path : Path
        The PNG.

    Raises
    ------
    CakeError
        It cannot be written, or matplotlib is not installed.
    """
    figure, axes = new_figure(1, len(studies), 7.0 * len(studies), 5.0)
    systems: list[str] = []
    shown: list[dict[str, tuple[float, float]]] = []
    for ax, (name, study) in zip(axes, studies.items(), strict=True):
        points = {one["name"]: (one["kept"], one["kl"]) for one in study["methods"] if one["option"]}
        shown.append({way: point for way, point in points.items() if point[1] > 0})
        for way, (kept, kl) in shown[-1].items():
            system = way.partition(":")[0]
            if system not in systems:
                systems.append(system)
            ax.plot(kept, kl, **marker(systems.index(system)))
        settings = study["settings"]
        asked = ", with the question in the prompt" if settings["questions"] == "first" else ""
        ax.set_title(f"{name}: {settings['tokens']:,} tokens{asked}", loc="left", fontsize=10, fontweight="bold")
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        ax.set_xlim(0, 1)
        ax.minorticks_off()
        ax.grid(color="#eeeeee")
        ax.set_xlabel("share of the cache that is kept")
        ax.set_ylabel("KL divergence, nats (less is better)")
    divergences = [kl for points in shown for _, kl in points.values()]
    for ax in axes:
        ax.set_ylim(min(divergences) / 2, max(divergences) * 2)
    figure.canvas.draw()  # places labels by what has been laid out
    figure.set_layout_engine("none")
    for ax, points in zip(axes, shown, strict=True):
        label(ax, points)
    save_figure(figure, path)
