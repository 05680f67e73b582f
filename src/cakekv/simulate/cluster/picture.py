"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw how TTFT is distributed under each system, and each system's goodput.

    Parameters
    ----------
    data : dict
        As of `comparison.to_dict`.
    path : Path
        The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings, systems = data["settings"], data["systems"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for result in systems:
        left.plot(result["ttft_quantiles_s"], data["quantiles"], label=result["system"])
    left.axvline(settings["ttft_target_s"], color="grey", linestyle=":")
    left.set(xscale="log", xlabel="TTFT (s), dotted: the target", ylabel="share of requests", ylim=(0, 1))
    left.grid(alpha=0.3)
    left.legend()
    bars = right.bar([result["system"] for result in systems], [result["goodput_per_s"] for result in systems])
    for bar, color in zip(bars, [line.get_color() for line in left.get_lines()], strict=False):
        bar.set_color(color)
    right.set(ylabel="goodput (requests/s within the target)")
    right.bar_label(bars, fmt="%.1f")
    figure.suptitle(
        f"{settings['requests']} requests, {settings['gpus']} × {settings['gpu']}, {settings['model']}, "
        f"{settings['tiers']}"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
