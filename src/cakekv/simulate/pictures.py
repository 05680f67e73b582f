"""PNG pictures of what the simulator found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from cakekv.simulate.paper import Prediction
from cakekv.simulate.study import Outcome
from cakekv.simulate.what_if import Verdict


def draw_paper(path: Path, predictions: Sequence[Prediction], figures: dict[str, Any]) -> None:
    """Predicted beside printed speed-ups, and Figures 5 and 6."""
    figure, (cells, walk, burst) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    printed = [value for prediction in predictions for value in prediction.paper]
    for name, marker in (("baseline", "x"), ("ours", "+")):
        predicted = [value for prediction in predictions for value in getattr(prediction, name)]
        cells.loglog(printed, predicted, marker, label=name, markersize=5)
    limits = [min(printed) * 0.9, max(printed) * 1.1]
    cells.loglog(limits, limits, color="grey", linewidth=0.8, label="as printed")
    cells.set(title="Tables 3-6: speed-ups", xlabel="the paper's Cake", ylabel="simulated")
    cells.legend()

    for key, name, style in (("frontiers", "ours", "-"), ("baseline_frontiers", "baseline", "--")):
        points = figures["figure_5"][key]
        times = [point["time_s"] for point in points]
        walk.step(
            times,
            [min(point["front"], point["back"]) for point in points],
            "C0" + style,
            where="post",
            label=f"computed, {name}",
        )
        walk.step(times, [point["back"] for point in points], "C1" + style, where="post", label=f"loaded, {name}")
    walk.set(title="Figure 5: fluctuating resources", xlabel="seconds", ylabel="position (tokens)")
    walk.legend()

    mine, paper = figures["figure_6"]["ours"], figures["figure_6"]["paper"]
    places = np.arange(2)
    burst.bar(places - 0.2, [paper["fcfs_s"], paper["adaptive_s"]], 0.4, label="the paper")
    burst.bar(places + 0.2, [mine["fcfs_s"], mine["adaptive_s"]], 0.4, label="ours")
    burst.set_xticks(places, ["first come, first served", "adaptive"])
    burst.set(title="Figure 6: 16k stored prefix and a burst of 22", ylabel="seconds until all are prefilled")
    burst.legend()
    _save(figure, path)


def draw_plan(path: Path, verdicts: Sequence[Verdict], asked: Verdict) -> None:
    """Time to first token over the bandwidth: computed, loaded, both."""
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    gbps = [8e-9 * verdict.bandwidth for verdict in verdicts]
    for name in ("compute", "load", "both"):
        ax.plot(gbps, [getattr(verdict, f"{name}_s") for verdict in verdicts], label=name)
    ax.axvline(8e-9 * asked.bandwidth, color="grey", linewidth=0.8, label="as asked")
    ax.set(
        title=f"{asked.model}, {asked.prompt_tokens:,} tokens, of which {asked.stored_tokens:,} stored",
        xlabel="bandwidth of the storage (Gbps)",
        ylabel="seconds to the first token",
        xscale="log",
        ylim=(0, 2.5 * asked.compute_s),
    )
    ax.legend()
    _save(figure, path)


def draw_study(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Distribution of time over the optimum, and over the better arm."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for fluctuates in (False, True):
        for warm in (True, False):
            mine = [o for o in outcomes if (o.configuration.fluctuates, o.configuration.warm) == (fluctuates, warm)]
            name = f"{'fluctuating' if fluctuates else 'constant'}, {'warm' if warm else 'cold'}"
            share = np.linspace(0, 1, len(mine))
            axes[0].plot(sorted(o.ratio for o in mine), share, label=name)
            axes[1].plot(sorted(o.against_better_arm for o in mine), share, label=name)
    axes[0].set(title="Time over the clairvoyant optimum", xlim=(0.99, 1.5), ylabel="share of the configurations")
    axes[1].set(title="Time over the better single arm", xlim=(0.4, 1.5))
    for ax in axes:
        ax.axvline(1.0, color="grey", linewidth=0.8)
        ax.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
