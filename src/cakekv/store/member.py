"""One tier of a tiered store: asked with a deadline, left alone while it is down, retried in the background."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import TypeVar

from cakekv.errors import (
    CannotPin,
    MissingChunk,
    NoAnswer,
    NotDeleted,
    OutOfReach,
    PinRefused,
    ReadOnly,
    StoreError,
    StoreFull,
    TierDown,
    UnknownKey,
    Unreadable,
)
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.store.asking import Asker, Late
from cakekv.store.base import ChunkReader, Evicted, Store, StoredChunk, StoreStats
from cakekv.store.pins import Pins
from cakekv.store.wrapper import WrappedReader

Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)

DEADLINE_S = 1.0
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
FAILURES = 3
"""So many operations of a kind that fail in a row mean that a tier is down. One that gets no answer means so at once,
if nobody else has got one meanwhile; and so does a look-up that fails."""

_MOST_OVERDUE = 4
"""Look-ups that may hang in a tier, from times at which it was down, while it is asked again."""
_PROBE = [ChunkKey(bytes([number]) * ChunkKey.LENGTH) for number in range(16)]
"""What is asked for to see whether a tier is back: of a cluster, all nodes."""
_OF_ONE_CHUNK = (
    MissingChunk,
    StoreFull,
    UnknownKey,
    OutOfReach,
    NotDeleted,
    ReadOnly,
    Unreadable,
    PinRefused,
    CannotPin,
)
"""Errors of one chunk, or of all, but not of a tier in trouble."""


class Member(Store):
    """A store that may come and go.

    While it is down every operation fails at once with a `StoreError` that says why; a thread of its own finds out
    when it is back, with pauses that double from 1 s to 60 s; they go on from there if it fails again before it has
    done again what it failed in.

    Parameters
    ----------
    open_inner : callable
        Opens the store; tried again later if it raises `StoreError`.
    name : str
        For messages, and for reports until the store has been opened.
    deadline_s : float
        Seconds that a look-up may take. One that takes longer counts as failed; its answer is not waited for.
    first_retry_s : float
        The first pause, in seconds.
    """

    def __init__(
        self,
        open_inner: Callable[[], Store],
        name: str,
        *,
        deadline_s: float = DEADLINE_S,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self.name = name
        self._open_inner = open_inner
        self._asker = Asker(deadline_s, most_overdue=_MOST_OVERDUE)
        self._first_retry_s = first_retry_s
        self._inner: Store | None = None
        self._reason: str | None = None
        self._failures: Counter[str] = Counter()
        """In a row, by kind of operation."""
        self._down_by = ""
        """The kind of operation that last took it down."""
        self._answered_at = -math.inf
        """When an operation last got an answer, be it an error."""
        self._next_retry_s = first_retry_s
        self.retry_s = 0.0
        """The pause before it is asked again, in seconds; 0 while it is up."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self._opened()
        except StoreError as error:
            self._go_down(error, "lookup")

    @property
    def parts(self) -> Sequence[Store]:
        return [self._inner] if self._inner is not None else []

    @property
    def is_closed(self) -> bool:
        """Whether it is in use no more."""
        return self._closed.is_set()

    @property
    def is_up(self) -> bool:
        """Whether it is in use."""
        return self._reason is None

    @property
    def evicted(self) -> Evicted:
        return Evicted() if self._inner is None else self._inner.evicted

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        return self._asked(lambda inner: inner.lookup(keys))

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        return self._asked(lambda inner: inner.probe(keys))

    def open(self, key: ChunkKey) -> ChunkReader:
        # No sign of health: where it is known what the tier holds, nothing is asked of it.
        return _MemberReader(self, self.attempt(lambda inner: inner.open(key), "read", proves=False))

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        return self.attempt(lambda inner: inner.write(key, data), "write")

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        return self.attempt(lambda inner: inner.delete(keys))

    def __iter__(self) -> Iterator[StoredChunk]:
        inner, began = self._up(), monotonic()
        try:
            yield from inner
        except StoreError as error:
            self.failed(error, "list", began)
            raise

    def stats(self) -> StoreStats:
        return self.attempt(lambda inner: inner.stats())

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        self.attempt(lambda inner: inner.remember_identity(root, fields))

    def identities(self) -> dict[str, dict[str, str]]:
        return self.attempt(lambda inner: inner.identities())

    def pin(self, name: ChunkKey, keys: Sequence[ChunkKey], ttl_s: float, chunk_bytes: int) -> None:
        self.attempt(lambda inner: inner.pin(name, keys, ttl_s, chunk_bytes))

    def release(self, name: ChunkKey) -> bool:
        return self.attempt(lambda inner: inner.release(name))

    def pins(self) -> Pins:
        return self.attempt(lambda inner: inner.pins())

    def tidy(self) -> list[str]:
        return self.attempt(lambda inner: inner.tidy())

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            inner, self._inner = self._inner, None
            self._reason = self._reason or "it is closed"
        if inner is not None:
            inner.close()

    def attempt(self, operation: Callable[[Store], Result], kind: str = "", *, proves: bool = True) -> Result:
        """Do something with the store, if it is up, and draw conclusions if it fails; and if it succeeds, if that
        `proves` that the tier can do it."""
        inner, began = self._up(), monotonic()
        try:
            result = operation(inner)
        except _OF_ONE_CHUNK:
            raise
        except StoreError as error:
            self.failed(error, kind, began)
            raise
        if proves:
            self._succeeded(kind)
        return result

    def failed(self, error: StoreError, kind: str, began: float) -> None:
        """An operation that began then failed."""
        self._failures[kind] += 1
        silent = isinstance(error, NoAnswer) and max(self._answered_at, self._asker.answered_at) <= began
        if not isinstance(error, NoAnswer):
            self._answered_at = monotonic()
        if silent or self._failures[kind] >= FAILURES:
            self._go_down(error, kind)

    def _succeeded(self, kind: str) -> None:
        self._answered_at = monotonic()
        self._failures[kind] = 0
        if kind == self._down_by:
            self._next_retry_s = self._first_retry_s

    def _asked(self, question: Callable[[Store], Result]) -> Result:
        """The answer to a question of what the tier holds; if there is none, the tier is down."""
        inner = self._up()
        try:
            answer = self._asker.ask(lambda: question(inner)).answer()
        except StoreError as error:
            if isinstance(error, Late) and error.busy:
                raise
            self._go_down(error, "lookup")
            raise TierDown(str(error)) from error
        self._succeeded("lookup")
        return answer

    def _up(self) -> Store:
        inner, reason = self._inner, self._reason
        if inner is None or reason is not None:
            raise TierDown(f"the {self.name} tier is down and will be tried again: {reason}")
        return inner

    def _opened(self) -> Store:
        if self._inner is None:
            inner = self._open_inner()
            self.name, self.url, self.parallel_reads = inner.name, inner.url, inner.parallel_reads
            self._inner = inner
        return self._inner

    def _go_down(self, error: StoreError, kind: str) -> None:
        with self._lock:
            if self._reason is None and not self._closed.is_set():
                self._reason = str(error)
                self._down_by = kind
                self.retry_s = self._next_retry_s
                emit(_LOG, logging.WARNING, "tier_down", tier=self.name, reason=self._reason)
                threading.Thread(target=self._recover, name=f"cakekv-retry-{self.name}", daemon=True).start()

    def _recover(self) -> None:
        down_at = monotonic()
        while not self._closed.wait(self.retry_s):
            try:
                self._opened().lookup(_PROBE)
            except StoreError as error:
                self._reason = str(error)
                self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)
            else:
                self._failures.clear()
                self._next_retry_s = min(2 * self.retry_s, LAST_RETRY_S)
                self.retry_s = 0.0
                emit(_LOG, logging.INFO, "tier_up", tier=self.name, down_s=round(monotonic() - down_at, 3))
                self._reason = None
                return


class _MemberReader(WrappedReader):
    """Tells the member when a read fails."""

    def __init__(self, member: Member, inner: ChunkReader) -> None:
        super().__init__(inner)
        self._member = member

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return self._member.attempt(lambda _: self._inner.read_into(buffer, offset), "read")
