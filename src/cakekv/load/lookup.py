"""What the tiers hold: all of them are asked at once, and none is waited for longer than a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.store.asking import Asker, Late, Question
from cakekv.store.base import Store

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
        for tier, question in zip(self._tiers, questions, strict=True):
            try:
                answers.append(question if isinstance(question, StoreError) else question.answer())
            except StoreError as error:
                answers.append(error)
                name = "deadline_missed" if isinstance(error, Late) else "tier_failed"
                emit(_LOG, logging.WARNING, name, tier=tier.name, operation=operation, reason=str(error))
        return answers
