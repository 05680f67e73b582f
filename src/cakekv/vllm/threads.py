"""Background threads beside vLLM's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread that may run on any CPU.

    vLLM pins its CPU workers, and threads inherit that: a loader would compete with the model for one core.
    """

    def run() -> None:
        if hasattr(os, "sched_setaffinity"):
            with suppress(OSError):  # where it is not allowed, stay where vLLM put us
                os.sched_setaffinity(0, range(os.cpu_count() or 1))
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
