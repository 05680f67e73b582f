"""What became of restores: reports for whoever asked, metrics, lines in the log."""

from __future__ import annotations

from collections import deque

from cakekv.restore.report import RestoreReport
from cakekv.vllm.metrics import CakeStats
from cakekv.vllm.scheduling.asked import log_restore

_REMEMBERED = 64


class Outcomes:
    """Keeps the reports of restores that ended.

    Parameters
    ----------
    log_requests : bool
        Whether each gets a line in vLLM's log.
    """

    def __init__(self, log_requests: bool) -> None:
        self.latest: deque[tuple[str, RestoreReport]] = deque(maxlen=_REMEMBERED)
        """The latest, with their requests."""
        self._log_requests = log_requests
        self._wanted: dict[str, RestoreReport] = {}
        self._stats = CakeStats()

    def ended(self, request_id: str, report: RestoreReport, wanted: bool, complete: bool) -> None:
        """A restore is over; `wanted` if its request asked for the report, `complete` if its prompt is."""
        self.latest.append((request_id, report))
        self._stats.add_restore(report, complete)
        if wanted:
            self._wanted[request_id] = report
        if self._log_requests:
            log_restore(request_id, report)

    @property
    def awaited(self) -> bool:
        """Whether reports wait to be handed out."""
        return bool(self._wanted)

    def report(self, request_id: str) -> RestoreReport | None:
        """The report that a request asked for, if its restore is over."""
        return self._wanted.get(request_id)

    def take_report(self, request_id: str) -> RestoreReport | None:
        """The report that a request asked for, which is over now."""
        return self._wanted.pop(request_id, None)

    def take_stats(self) -> CakeStats | None:
        """What happened since the last time, if anything did."""
        stats, self._stats = self._stats, CakeStats()
        return None if stats.is_empty() else stats
