"""Writes a restore that has ended into the log, as one event."""

from __future__ import annotations

import logging
from collections import Counter

from cakekv.logs import emit
from cakekv.report.metrics import kind_of
from cakekv.restore.report import RestoreReport

_LOG = logging.getLogger(__name__)


def log_restore(report: RestoreReport) -> None:
    """Log the figures of a restore in one line."""
    if not _LOG.isEnabledFor(logging.INFO):
        return
    missed: Counter[str] = Counter()
    for reason, tokens in report.miss_reasons().items():
        missed[kind_of(reason)] += tokens
    emit(
        _LOG,
        logging.INFO,
        "restore_finished",
        mode=report.mode,
        prompt_tokens=report.prompt_tokens,
        prefix_tokens=report.prefix_tokens,
        computed_tokens=report.computed_tokens,
        loaded_tokens=report.loaded_tokens,
        recomputed_tokens=report.recomputed_tokens,
        met_at=report.met_at,
        ttft_s=round(report.ttft_s, 4),
        lookup_s=round(report.lookup_s, 4),
        wasted_bytes=report.wasted_bytes,
        bytes_by_tier=report.bytes_by_tier,
        missed_tokens=dict(missed),
    )
