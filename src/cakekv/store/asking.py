"""Asks a tier with a deadline, and does not wait for an answer that is late."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextvars import ContextVar
from itertools import islice
from time import monotonic
from typing import Generic, TypeVar

from cakekv.errors import NoAnswer, StoreError

Answer = TypeVar("Answer")
Item = TypeVar("Item")

_IN_TIME = 0.8
"""A part of the deadline, after which who has asked for many things at once gives what there is."""
_UNTIL: ContextVar[float] = ContextVar("cakekv_until", default=math.inf)
"""When the question that this thread works for should be answered, as well as may be."""


class Late(NoAnswer):
    """A tier has not answered within its deadline.

    Parameters
    ----------
    reason : str
        In words.
    busy : bool
        Whether it has answered others meanwhile: it is at work, and does not hang.
    """

    def __init__(self, reason: str, *, busy: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy


class Asker:
    """Puts questions to one tier, each in a thread of its own.

    A thread that hangs in the tier is left behind, and ends whenever the tier lets it. While too many answers are
    overdue nothing more is asked, so that a tier which hangs costs its deadline once, and not each time. A tier that
    answers others meanwhile does not hang.

    Parameters
    ----------
    deadline_s : float
        Seconds that an answer may take.
    most_overdue : int
        So many overdue answers are too many.
    """

    def __init__(self, deadline_s: float, most_overdue: int = 1) -> None:
        self.deadline_s = deadline_s
        self._most_overdue = most_overdue
        self._lock = threading.Lock()
        self._overdue = 0
        self.answered_at = -math.inf
        """When the tier last answered, be it with an error."""

    def ask(self, question: Callable[[], Answer]) -> Question[Answer]:
        """Put a question; its answer can be had from what is returned.

        Raises
        ------
        Late
            Earlier answers are overdue.
        StoreError
            It cannot be put: the system has no thread to spare.
        """
        if self._overdue >= self._most_overdue:
            raise Late(f"it still owes an answer that was due within {self.deadline_s:g} s")
        try:
            return Question(self, question)
        except RuntimeError as error:
            raise StoreError(f"no thread can be started to ask it: {error}") from error

    def count(self, overdue: int) -> None:
        """So many more, or fewer, answers are overdue."""
        with self._lock:
            self._overdue += overdue


class Question(Generic[Answer]):
    """A question that was put."""

    def __init__(self, asker: Asker, question: Callable[[], Answer]) -> None:
        self._asker = asker
        self._question = question
        self._began = monotonic()
        self._until = self._began + asker.deadline_s
        self._due = min(self._began + _IN_TIME * asker.deadline_s, _UNTIL.get())
        self._changed = threading.Condition()
        self._answered = self._given_up = False
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="cakekv-ask", daemon=True).start()

    def answer(self) -> Answer:
        """The answer, or what was raised instead of one.

        Raises
        ------
        Late
            It has not come in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._answered, self._until - monotonic()):
                busy = self._asker.answered_at > self._began
                if not self._given_up and not busy:
                    self._given_up = True
                    self._asker.count(1)
                raise Late(f"no answer within {self._asker.deadline_s:g} s", busy=busy)
        if self._error is not None:
            raise self._error
        return self._answer

    def _work(self) -> None:
        _UNTIL.set(self._due)
        try:
            self._answer = self._question()
        except BaseException as error:
            self._error = error
        if not isinstance(self._error, NoAnswer):
            self._asker.answered_at = monotonic()
        with self._changed:
            self._answered = True
            self._changed.notify_all()
            if self._given_up:
                self._asker.count(-1)


def ask_each(
    pool: Executor,
    ask: Callable[[Item], Answer],
    items: Iterable[Item],
    at_once: int,
    abandoned: dict[Item, Future[Answer]] | None = None,
) -> Iterator[tuple[Item, Future[Answer]]]:
    """Ask for each item by itself, several at a time, until the asker's deadline.

    Yields each item with its answer, as they come. What has none by then is not begun any more; what has begun goes on
    in the pool, and is added to `abandoned`.
    """
    left = iter(items)
    flying: dict[Future[Answer], Item] = {}
    try:
        while True:
            for item in islice(left, at_once - len(flying)):
                flying[pool.submit(ask, item)] = item
            left_s = _UNTIL.get() - monotonic()
            done, _ = wait(flying, None if left_s == math.inf else max(left_s, 0.0), FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                yield flying.pop(future), future
    finally:
        for future, item in flying.items():
            if not future.cancel() and abandoned is not None:
                abandoned[item] = future
