"""What goes wrong again and again is said once, and then counted."""

from __future__ import annotations

import logging
import threading
from time import monotonic

_LOG = logging.getLogger("vllm.cakekv")

QUIET_S = 60.0
"""Seconds for which the same trouble is only counted after a line about it."""


class Complaints:
    """Logs the first of many messages about one kind of trouble, and from time to time how many there were since.

    Parameters
    ----------
    what : str
        The trouble, as a sentence without its full stop.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._quiet_until = float("-inf")
        self._since = 0
        """How often it happened since it was last said."""

    def say(self, why: str, exc_info: bool = False) -> None:
        """It happened once more; `exc_info` if the exception that is being handled is to be shown whole."""
        with self._lock:
            if monotonic() < self._quiet_until:
                self._since += 1
                return
            since, self._since = self._since, 0
            self._quiet_until = monotonic() + QUIET_S
        again = f" ({since:,} times more since this was last said)" if since else ""
        _LOG.warning("cakekv: %s: %s%s", self._what, why, again, exc_info=exc_info)
