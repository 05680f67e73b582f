"""Questions to a tier with a deadline: an answer that does not come in time is not waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Generic, TypeVar

from cakekv.errors import StoreError

Answer = TypeVar("Answer")


class Late(StoreError):
    """A tier has not answered within its deadline."""


class Asker:
    """Puts questions to one tier, each in a thread of its own.

    A thread that hangs in the tier is left behind, and ends whenever the tier lets it. While too many answers are
    overdue nothing more is asked, so that a tier which hangs costs its deadline once, and not each time.

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
        self._until = monotonic() + asker.deadline_s
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
                if not self._given_up:
                    self._given_up = True
                    self._asker.count(1)
                raise Late(f"no answer within {self._asker.deadline_s:g} s")
        if self._error is not None:
            raise self._error
        return self._answer

    def _work(self) -> None:
        try:
            self._answer = self._question()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._answered = True
            self._changed.notify_all()
            if self._given_up:
                self._asker.count(-1)
