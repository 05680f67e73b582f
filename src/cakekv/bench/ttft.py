"""Times to the first token: how programs measure them side by side, and one file that several of them write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cakekv.bench.bound import compute_curve
from cakekv.bench.grid import fill
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.errors import CakeError
from cakekv.restore.report import RestoreReport

Result = TypeVar("Result")


def stored(cake: Cake, prompt: Sequence[int], prefix: int) -> RestoreReport:
    """Store the prefix of a prompt, and load it.

    Raises
    ------
    CakeError
        It could not be stored, or not be loaded.
    """
    fill(cake, prompt[:prefix])
    report = cake.prefill(prompt, mode="load", save=False).report
    if report.loaded_tokens < prefix:
        raise CakeError(f"only {report.loaded_tokens} of {prefix} tokens were loaded: {report.miss_reasons()}")
    return report


def restore(cake: Cake, prompt: Sequence[int]) -> RestoreReport:
    """Restore a prompt from both ends; nothing is saved."""
    return cake.prefill(prompt, mode="both", save=False).report


def balanced_bandwidth(cake: Cake, prompt: Sequence[int], loaded: RestoreReport) -> float:
    """Bytes per second with which loading a prefix, as `stored` did, takes as long as computing it."""
    alone = cake.prefill(prompt, mode="compute", save=False).report
    return sum(loaded.bytes_by_tier.values()) / compute_curve(alone.spans).at(loaded.prefix_tokens)


def in_turns(ways: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Run every way so many times, in rounds, forwards and backwards; one round more, the first, teaches the costs."""
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name in reversed(list(ways)) if number % 2 else ways:
            found[name].append(ways[name]())
    return {name: results[1:] for name, results in found.items()}


def write_ttft(file: Path, engine: str, points: Sequence[dict[str, Any]]) -> None:
    """Put points into a file's list `ttft`, instead of those of that engine; all else in it stays."""
    data = json.loads(file.read_text()) if file.exists() else {}
    kept = [one for one in data.get("ttft", ()) if one["engine"] != engine]
    write_json(file, {**data, "ttft": [*kept, *points]})
