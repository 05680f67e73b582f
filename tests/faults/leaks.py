"""Whether a process keeps growing: samples of its memory, files and threads, and the trend in them."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

ALLOWED_BYTES = 4 << 20
"""By so much may memory drift, from the first to the last sample, without being a leak: allocators have their whims."""
ALLOWED_COUNT = 2
"""Likewise files and threads, of which some come and go."""


class Sample(NamedTuple):
    """One process at one moment."""

    done: float
    """How much work was done by then, in any unit."""
    memory: int
    """Bytes of anonymous memory that are resident."""
    files: int
    """Open descriptors."""
    threads: int


def sample(done: float) -> Sample:
    """This process now, without what is only waiting to be collected."""
    gc.collect()
    _TRIM(0)
    status = Path("/proc/self/status").read_text()
    memory = 1024 * int(status.partition("RssAnon:")[2].split()[0])
    return Sample(done, memory, len(os.listdir("/proc/self/fd")), threading.active_count())


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much each figure grew from the first to the last sample, going by the median of all slopes (Theil, Sen).

    Up to a quarter of the samples may lie anywhere without changing that much.
    """
    span = samples[-1].done - samples[0].done
    pairs = [(first, last) for first, last in combinations(samples, 2) if last.done > first.done]
    return {
        name: span
        * statistics.median(
            (getattr(last, name) - getattr(first, name)) / (last.done - first.done) for first, last in pairs
        )
        for name in ("memory", "files", "threads")
    }


def leaks(samples: Sequence[Sample], allowed_bytes: int = ALLOWED_BYTES) -> list[str]:
    """What leaks: one sentence each."""
    allowed = {"memory": allowed_bytes, "files": ALLOWED_COUNT, "threads": ALLOWED_COUNT}
    return [
        f"{name} grew by {grown:,.0f}, from {getattr(samples[0], name):,} to {getattr(samples[-1], name):,}"
        for name, grown in growth(samples).items()
        if grown > allowed[name]
    ]


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
"""Gives memory that is free back to the system, where the C library can."""
