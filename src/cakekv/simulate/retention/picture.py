"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw the seconds of TTFT that each policy saves over the capacity, for each bandwidth.

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

    rows = [row for row in data["rows"] if not row["rule"]]
    ratios = sorted({row["ratio"] for row in rows})
    figure, axes = pyplot.subplots(1, len(ratios), figsize=(3.6 * len(ratios), 4), squeeze=False, layout="constrained")
    for axis, ratio in zip(axes[0], ratios, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            curve = sorted(
                (row["capacity_bytes"] / 1e9, 100.0 * row["saved_share"])
                for row in rows
                if (row["policy"], row["ratio"]) == (policy, ratio)
            )
            axis.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=policy)
        axis.set(xscale="log", xlabel="capacity (GB)", title=f"{ratio:g} × the balanced bandwidth", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TTFT saved (% of computing everything)")
    axes[0][0].legend()
    settings = data["settings"]
    figure.suptitle(f"{settings['requests']} requests ({settings['trace']}), {settings['model']}, {settings['gpu']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
