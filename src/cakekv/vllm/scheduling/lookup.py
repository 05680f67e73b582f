"""Asks the stores what they hold, beside the scheduler: all requests that wait at a moment in one round trip."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from cakekv.chunk import is_packed
from cakekv.errors import CakeError
from cakekv.keys import ChunkKey
from cakekv.store.base import Store
from cakekv.store.sizes import doubt_of
from cakekv.vllm.complaints import Complaints
from cakekv.vllm.threads import start_thread


@dataclass
class _Question:
    """Which tiers hold the chunks of one request?"""

    keys: list[ChunkKey]
    exact: range
    """Of these chunks, only exact ones will do."""
    asked_at: float
    sizes: dict[int, list[int]] = field(default_factory=dict)
    """By tier, the bytes of the chunks found."""
    answers: dict[int, list[bool]] = field(default_factory=dict)
    """By tier, as far as they have answered."""
    known: float | None = None
    """When the answer was first given."""
    complete: list[tuple[int, ...]] | None = None
    """The answer, once no tier owes its part."""
    promising: bool = True
    """Whether that names any tier."""


class BackgroundLookup:
    """One thread per tier, so that one that hangs delays nobody else's answers.

    Parameters
    ----------
    tiers : sequence of Store
        Whom to ask.
    shards : sequence of callable
        From a chunk's key to those of its shards; it is stored if all of them are.
    exact_bytes : int
        Of a shard in the exact form; coded ones are smaller.
    patience_s : float
        A tier that has not answered after so many seconds is taken to hold nothing; as long as it owes that answer,
        nobody waits for it.
    """

    def __init__(
        self,
        tiers: Sequence[Store],
        shards: Sequence[Callable[[ChunkKey], ChunkKey]],
        exact_bytes: int,
        patience_s: float,
    ) -> None:
        self._tiers = tiers
        self._shards = shards
        self._exact_bytes = exact_bytes
        self.patience_s = patience_s
        self._changed = threading.Condition()
        self._questions: dict[str, _Question] = {}
        self._waiting: list[list[_Question]] = [[] for _ in tiers]
        self._busy_since: list[float | None] = [None for _ in tiers]
        self._closed = False
        self._complaints = [Complaints(f"the {tier.name} store does not say what it holds") for tier in tiers]
        for tier, store in enumerate(tiers):
            start_thread(f"cakekv-lookup-{store.name}", lambda tier=tier: self._work(tier))  # type: ignore[misc]

    @property
    def tiers(self) -> int:
        """How many tiers there are."""
        return len(self._tiers)

    def ask(self, request_id: str, keys: list[ChunkKey], exact: range) -> None:
        """Find out where these chunks are, those of `exact` in exact form; replaces what was asked before."""
        question = _Question(keys, exact, monotonic())
        with self._changed:
            self._questions[request_id] = question
            if keys:
                for queue in self._waiting:
                    queue.append(question)
                self._changed.notify_all()

    def answer(self, request_id: str) -> list[tuple[int, ...]] | None:
        """Per chunk, the tiers that hold it; None if that is not known yet."""
        question = self._questions.get(request_id)
        if question is None or not question.keys:
            return []
        if question.complete is not None:
            return question.complete
        answers = question.answers.copy()  # more may come meanwhile
        now = monotonic()
        for tier in range(len(self._tiers)):
            if tier not in answers and not self._overdue(tier, question, now):
                return None
        question.known = question.known or now
        held = answers.items()
        stored = [tuple(tier for tier, chunks in held if chunks[chunk]) for chunk in range(len(question.keys))]
        if len(answers) == len(self._tiers):
            question.promising = any(stored)
            question.complete = stored
        return stored

    def promising(self, request_id: str) -> bool:
        """Whether some chunk of the request is, or may turn out to be, stored."""
        question = self._questions.get(request_id)
        if question is not None and question.complete is not None:
            return question.promising
        stored = self.answer(request_id)
        return stored is None or any(stored)

    def asked_at(self, request_id: str) -> float:
        """When the stores were asked about the request, on `time.monotonic`'s clock; 0.0 if they never were."""
        question = self._questions.get(request_id)
        return 0.0 if question is None else question.asked_at

    def seconds(self, request_id: str) -> float:
        """How long the request's answer took to come."""
        question = self._questions.get(request_id)
        return 0.0 if question is None or question.known is None else question.known - question.asked_at

    def chunk_bytes(self, request_id: str) -> list[int | None]:
        """By tier, bytes of the request's chunks that it holds, on average; None if there are none."""
        question = self._questions.get(request_id)
        found = [[] if question is None else question.sizes.get(tier, []) for tier in range(len(self._tiers))]
        return [sum(sizes) // len(sizes) if sizes else None for sizes in found]

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        with self._changed:
            self._questions.pop(request_id, None)

    def close(self) -> None:
        """Stop, without waiting for a tier that hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _overdue(self, tier: int, question: _Question, now: float) -> bool:
        since = self._busy_since[tier]
        since = question.asked_at if since is None else min(since, question.asked_at)
        return now - since >= self.patience_s

    def _work(self, tier: int) -> None:
        store = self._tiers[tier]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting[tier] or self._closed)
                if self._closed:
                    return
                alive = set(map(id, self._questions.values()))  # others were forgotten, or ask anew
                batch = [question for question in self._waiting[tier] if id(question) in alive]
                self._waiting[tier] = []
                if not batch:
                    continue
                self._busy_since[tier] = monotonic()
            keys = [shard(key) for question in batch for key in question.keys for shard in self._shards]
            try:
                found = store.lookup(keys)
                if doubt := doubt_of(found):
                    self._complaints[tier].say(doubt)
            except CakeError as error:
                self._complaints[tier].say(str(error))
                found = [None] * len(keys)
            except Exception:
                self._complaints[tier].say("it failed in a way that no store should", exc_info=True)
                found = [None] * len(keys)
            # The scheduler never waits for this: the lock is held to publish an answer, not to read it.
            first, answers = 0, []
            for question in batch:
                answers.append(self._held(question, found, first))
                first += len(question.keys) * len(self._shards)
            with self._changed:
                self._busy_since[tier] = None
                for question, (held, sizes) in zip(batch, answers, strict=True):
                    question.sizes[tier] = sizes
                    question.answers[tier] = held

    def _held(self, question: _Question, found: Sequence[int | None], first: int) -> tuple[list[bool], list[int]]:
        """Which of a question's chunks a tier has in a form that will do, and their bytes.

        `found` are the sizes of all questions' shards, this one's from `first` on.
        """
        held, found_bytes, shards = [], [], len(self._shards)
        for chunk in range(len(question.keys)):
            sizes = found[first + chunk * shards : first + (chunk + 1) * shards]
            stored = [size for size in sizes if size is not None]
            whole = len(stored) == len(sizes)
            exact = all(size >= self._exact_bytes or is_packed(size) for size in stored)
            held.append(whole and (exact or chunk not in question.exact))
            if held[-1]:
                found_bytes.append(sum(stored))
        return held, found_bytes
