"""What became of restores: reports for whoever asked, metrics, lines in the log."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from cakekv.quantities import format_bytes
from cakekv.restore.report import RestoreReport
from cakekv.vllm.metrics import CakeStats
from cakekv.vllm.scheduling.request_options import FIELD

_LOG = logging.getLogger("vllm.cakekv")  # a child of vLLM's own logger, so that it is set up like it

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


def answer(report: RestoreReport) -> dict[str, Any]:
    """The `kv_transfer_params` of a response whose request asked for the report."""
    return {FIELD: report.to_dict()}


def log_restore(request_id: str, report: RestoreReport) -> None:
    """Write a line about a restore into vLLM's log."""
    reasons = ", ".join(f"{tokens:,} {reason}" for reason, tokens in report.miss_reasons().items())
    _LOG.info(
        "cakekv: %s: prompt of %s tokens, %s computed, %s loaded (%s)%s, met at %s, %.3f s until complete%s",
        request_id,
        f"{report.prompt_tokens:,}",
        f"{report.computed_tokens:,}",
        f"{report.loaded_tokens:,}",
        ", ".join(f"{format_bytes(size)} from {tier}" for tier, size in report.bytes_by_tier.items()) or "no store",
        f", {report.reused_tokens:,} of them from documents" if report.reused_tokens else "",
        "-" if report.met_at is None else f"{report.met_at:,}",
        report.ttft_s,
        f"; missed: {reasons}" if reasons else "",
    )
