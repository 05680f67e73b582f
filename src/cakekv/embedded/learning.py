"""Learns documents in the background: computes each by itself, once no prompt is being restored, and has it saved."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cakekv.embedded.executor import LOOK_S, Cancelled, check
from cakekv.logs import emit

_LOG = logging.getLogger(__name__)

_MOST = 64
"""Documents that may wait. What comes beyond that is learned when it is met again."""


class Stopped(Exception):
    """The `Cake` is being closed."""


class Learner:
    """Learns one document after the other, in the order in which they were met.

    Parameters
    ----------
    is_idle : callable
        Whether nothing else wants to compute.
    """

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._changed = threading.Condition()
        self._waiting: OrderedDict[tuple[int, ...], Callable[[], None]] = OrderedDict()
        self._busy = False
        self._thread: threading.Thread | None = None
        self.closed = False

    def offer(self, token_ids: Sequence[int], learn: Callable[[], None]) -> None:
        """Have a document learned by calling `learn`, unless it waits already, or too many do."""
        with self._changed:
            if self.closed or len(self._waiting) >= _MOST:
                return
            self._waiting.setdefault(tuple(token_ids), learn)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="cakekv-learn", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the system has no thread to spare: it is learned when it is met again
                    self._thread = None
                    self._waiting.clear()

    def check(self) -> None:
        """Raise `Stopped` if nothing is to be learned any more."""
        if self.closed:
            raise Stopped

    def wait(self) -> None:
        """Block until all that was met is learned, or nothing is to be learned any more."""
        while True:
            with self._changed:
                if self.closed or not (self._waiting or self._busy):
                    return
                self._changed.wait(LOOK_S)
            check()

    def close(self) -> None:
        """Learn nothing more; what is being learned stops soon. What of it is saved stays, and is used later."""
        with self._changed:
            self.closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while (learn := self._next()) is not None:
            try:
                learn()
            except (Stopped, Cancelled):
                pass
            except Exception as error:  # the prompt that it was met in has been answered
                if not self.closed:
                    emit(_LOG, logging.WARNING, "learning_failed", reason=f"{type(error).__name__}: {error}")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while self._waiting and not self._is_idle():
                self._changed.wait(LOOK_S)
            if not self._waiting:
                self._thread = None
                return None
            self._busy = True
            return self._waiting.popitem(last=False)[1]
