"""What a tier has evicted: counted, and summed up in the log now and then."""

from __future__ import annotations

import logging
from time import monotonic

from cakekv.logs import emit
from cakekv.store.base import Evicted

SUMMARY_S = 10.0
"""Seconds between two summaries at least."""

_LOG = logging.getLogger(__name__)


class Evictions:
    """Counts one tier's evictions. Whoever calls `add` holds the tier's lock.

    Parameters
    ----------
    tier : str
        Its name.
    """

    def __init__(self, tier: str) -> None:
        self.total = self._told = Evicted()
        self._tier = tier
        self._told_at = float("-inf")

    def add(self, size: int) -> None:
        """A chunk of `size` bytes was evicted."""
        self.total = Evicted(self.total.chunks + 1, self.total.bytes + size)
        now = monotonic()
        if now - self._told_at >= SUMMARY_S:
            chunks, size = self.total.chunks - self._told.chunks, self.total.bytes - self._told.bytes
            emit(_LOG, logging.INFO, "evicted", tier=self._tier, chunks=chunks, bytes=size)
            self._told, self._told_at = self.total, now
