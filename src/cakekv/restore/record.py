"""Keeps a restore's report while the planner decides."""

from __future__ import annotations

from collections.abc import Callable

from cakekv.restore.flights import Load
from cakekv.restore.report import FrontierPoint, LoadRecord, Miss, RestoreReport, SpanRecord


class Recorder:
    """Turns the planner's events into a `RestoreReport`.

    Parameters
    ----------
    report : RestoreReport
        Filled in as things happen.
    tier_names : list of str
        Names of the tiers.
    token_bytes : float
        Bytes to read per token.
    began : float
        The driver's clock when the restore began, in seconds.
    """

    def __init__(self, report: RestoreReport, tier_names: list[str], token_bytes: float, began: float) -> None:
        self.report = report
        self._token_bytes = token_bytes
        self._names = tier_names
        self._began = began
        self._reasons: dict[int, str] = {}
        report.bytes_by_tier = dict.fromkeys(tier_names, 0)

    def span(self, start: int, tokens: int, began: float, ended: float) -> None:
        """A span was computed."""
        self.report.spans.append(SpanRecord(start, tokens, began - self._began, ended - self._began))
        self.report.computed_tokens += tokens

    def load(self, load: Load, size: int, ended: float, outcome: str, tokens: int) -> None:
        """A load ended; `size` is what it really read, in bytes, and `tokens` what it completed."""
        report = self.report
        name = self._names[load.tier]
        began_s, ended_s = load.began - self._began, ended - self._began
        report.loads.append(
            LoadRecord(load.start, load.tokens, name, began_s, ended_s, size, outcome, load.group, load.parts)
        )
        report.bytes_by_tier[name] += size
        report.loaded_tokens += tokens
        if outcome != "placed":
            self._waste(size)

    def taken_back(self, tokens: int, size: int) -> None:
        """A placed chunk has to be loaded again."""
        self.report.loaded_tokens -= tokens
        self._waste(size)

    def _waste(self, size: int) -> None:
        self.report.wasted_bytes += size
        self.report.wasted_tokens = round(self.report.wasted_bytes / self._token_bytes)

    def gave_up(self, began: float, ended: float) -> None:
        """A layered span was given up."""
        self.report.notes.append(
            f"The suffix was begun {began - self._began:.3f} s after the start, while loads before it were on their "
            f"way; one of them failed, and {ended - began:.3f} s later it had to begin again."
        )

    def lost(self, start: int, reason: str) -> None:
        """The chunk at `start` was stored but cannot be had."""
        self._reasons[start] = reason

    def frontier(self, now: float, front: int, back: int) -> None:
        """One of the arms moved."""
        self.report.frontiers.append(FrontierPoint(now - self._began, front, back))

    def misses(self, missing: list[tuple[int, int]], why_not_stored: Callable[[int], str]) -> None:
        """Explain the runs of computed positions: `missing` holds (start, tokens) per chunk, ascending."""
        runs: list[Miss] = []
        for start, tokens in missing:
            reason = self._reasons.get(start) or why_not_stored(start)
            if runs and runs[-1].reason == reason and runs[-1].start + runs[-1].tokens == start:
                runs[-1] = runs[-1]._replace(tokens=runs[-1].tokens + tokens)
            else:
                runs.append(Miss(start, tokens, reason))
        self.report.misses = runs
        self.report.recomputed_tokens = sum(tokens for start, tokens in missing if start in self._reasons)
