"""Asks all tiers at once what they hold, and waits for none of them longer than a deadline."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TypeVar

from cakekv.errors import StoreError, TierDown
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.store.asking import Asker, Late, Question
from cakekv.store.base import Store
from cakekv.store.sizes import Sizes, doubt_of

Answer = TypeVar("Answer")

_LOG = logging.getLogger(__name__)


class Lookup:
    """Asks tiers what they hold.

    Parameters
    ----------
    tiers : sequence of Store
        Whom to ask.
    deadline_s : float
        Seconds that each may take. One that takes longer is not asked again before that answer has come.
    hangs : callable
        Whether a tier, by its index, is known not to answer; it is not asked then.
    """

    def __init__(self, tiers: Sequence[Store], deadline_s: float, hangs: Callable[[int], bool]) -> None:
        self._tiers = tiers
        self._hangs = hangs
        self._askers = [Asker(deadline_s) for _ in tiers]
        self._lock = threading.Lock()
        self._failed_at: dict[tuple[int, str], float] = {}
        """Since when each tier has failed to answer each kind of question; that is said once."""

    def sizes(self, keys: Sequence[ChunkKey]) -> list[list[int | None] | StoreError]:
        """As `Store.lookup` of each tier, or why it could not be asked."""
        return self._each("lookup", lambda tier: tier.lookup(keys))

    def identities(self) -> list[dict[str, dict[str, str]] | StoreError]:
        """As `Store.identities` of each tier, or why it could not be asked."""
        return self._each("identities", lambda tier: tier.identities())

    def _each(self, operation: str, ask: Callable[[Store], Answer]) -> list[Answer | StoreError]:
        questions: list[Question[Answer] | StoreError] = []
        for index, (tier, asker) in enumerate(zip(self._tiers, self._askers, strict=True)):
            try:
                if self._hangs(index):
                    raise Late("it is not asked, since none of its reads has come back for a while")
                questions.append(asker.ask(lambda tier=tier: ask(tier)))  # type: ignore[misc]
            except StoreError as error:
                questions.append(error)
        answers: list[Answer | StoreError] = []
        for index, question in enumerate(questions):
            try:
                answers.append(question if isinstance(question, StoreError) else question.answer())
            except StoreError as error:
                answers.append(error)
            self._log(index, operation, answers[-1])
        return answers

    def _log(self, index: int, operation: str, answer: object) -> None:
        tier, failed = self._tiers[index].name, isinstance(answer, StoreError)
        doubt = doubt_of(answer) if isinstance(answer, Sizes) else None
        with self._lock:
            since = self._failed_at.get((index, operation))
            if not failed and doubt is None:
                self._failed_at.pop((index, operation), None)
            else:
                self._failed_at.setdefault((index, operation), monotonic())
        if failed or doubt is not None:
            first = since is None and not isinstance(answer, TierDown)  # of that, the tier itself has told
            name = (
                "lookup_incomplete" if not failed else "deadline_missed" if isinstance(answer, Late) else "tier_failed"
            )
            reason = str(answer) if failed else doubt
            level = logging.WARNING if first else logging.DEBUG
            emit(_LOG, level, name, tier=tier, operation=operation, reason=reason)
        elif since is not None:
            emit(
                _LOG,
                logging.INFO,
                "tier_answers",
                tier=tier,
                operation=operation,
                after_s=round(monotonic() - since, 3),
            )
