"""The demo: one prompt, three ways, at the bandwidth where computing it and loading it take equally long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cakekv.bench.bound import compute_curve
from cakekv.cake import Cake, Generation
from cakekv.errors import CakeError
from cakekv.restore.options import Mode
from cakekv.restore.report import RestoreReport
from cakekv.results import OnProgress
from cakekv.store.throttled import ThrottledStore

MAX_NEW_TOKENS = 24
WARM_UP_TOKENS = 256


@dataclass
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    bandwidth : float
        The balanced bandwidth, in bytes per second.
    answers : dict
        Per mode.
    """

    bandwidth: float
    answers: dict[str, Generation]

    @property
    def reports(self) -> dict[str, RestoreReport]:
        """Per mode."""
        return {mode: answer.report for mode, answer in self.answers.items()}

    @property
    def identical(self) -> bool:
        """Whether all modes gave the same tokens."""
        return len({tuple(answer.token_ids) for answer in self.answers.values()}) == 1

    @property
    def both_over_better(self) -> float:
        """TTFT of both arms over that of the better single arm."""
        single = min(self.answers[mode].report.ttft_s for mode in ("compute", "load"))
        return self.answers["both"].report.ttft_s / single

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "bandwidth_bytes_per_s": self.bandwidth,
            "modes": {mode: _summary(answer) for mode, answer in self.answers.items()},
            "identical": self.identical,
            "both_over_better_single_arm": self.both_over_better,
        }


def run_demo(
    cake: Cake, link: ThrottledStore, token_ids: Sequence[int], bar: Callable[[str], AbstractContextManager[OnProgress]]
) -> DemoResult:
    """Run the three modes.

    Compute comes first and saves what it computes, as any first question does; that costs it a few percent.

    Parameters
    ----------
    cake : Cake
        Over `link`.
    link : ThrottledStore
        An empty store behind a link; its bandwidth is set here.
    token_ids : sequence of int
        The prompt.
    bar : callable
        Makes, for a mode, a context in which its progress is shown.

    Raises
    ------
    CakeError
        The prompt could not be stored.
    """
    cake.prefill(token_ids[:WARM_UP_TOKENS], mode="compute", save=False)
    answers: dict[str, Generation] = {}

    def answer(mode: Mode, save: bool) -> None:
        with bar(mode) as on_progress:
            answers[mode] = cake.generate(
                token_ids, mode=mode, max_new_tokens=MAX_NEW_TOKENS, save=save, on_progress=on_progress
            )

    answer("compute", save=True)
    saved = cake.wait_saved()
    if saved.error or not saved.saved_chunks:
        raise CakeError(f"the demo's prompt could not be stored: {saved.error or 'it is shorter than a chunk'}")
    prefix_tokens = saved.saved_chunks * cake.chunk_tokens
    bandwidth = saved.saved_bytes / compute_curve(answers["compute"].report.spans).at(prefix_tokens)
    link.set_bandwidth(bandwidth)
    answer("load", save=False)
    answer("both", save=False)
    return DemoResult(bandwidth, answers)


def _summary(answer: Generation) -> dict[str, Any]:
    report = answer.report
    return {
        "ttft_s": report.ttft_s,
        "computed_tokens": report.computed_tokens,
        "loaded_tokens": report.loaded_tokens,
        "met_at": report.met_at,
        "answer": answer.text,
    }
