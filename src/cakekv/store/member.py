"""A tier of a tiered store: asked with a deadline, left alone while it is down, and asked again behind the scenes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import TypeVar

from cakekv.errors import MissingChunk, NotDeleted, ReadOnly, StoreError, StoreFull, UnknownKey, Unreadable
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.store.asking import Asker
from cakekv.store.base import ChunkReader, Evicted, Store, StoredChunk, StoreStats
from cakekv.store.wrapper import WrappedReader

Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)

DEADLINE_S = 1.0
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
FAILURES = 3
"""So many failed operations in a row mean that a tier is down; a look-up that fails means so at once."""

_MOST_OVERDUE = 4
"""Look-ups that may hang in a tier, from times at which it was down, while it is asked again."""
_PROBE = ChunkKey(bytes(ChunkKey.LENGTH))


class Member(Store):
    """A store that may come and go.

    While it is down every operation fails at once with a `StoreError` that says why; a thread of its own finds out
    when it is back, with pauses that double from 1 s to 60 s.

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
        self._failures = 0
        self.retry_s = 0.0
        """The pause before it is asked again, in seconds; 0 while it is up."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self._opened()
        except StoreError as error:
            self._go_down(error)

    @property
    def parts(self) -> Sequence[Store]:
        return [self._inner] if self._inner is not None else []

    @property
    def is_up(self) -> bool:
        """Whether it is in use."""
        return self._reason is None

    @property
    def evicted(self) -> Evicted:
        return Evicted() if self._inner is None else self._inner.evicted

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        inner = self._up()
        try:
            return self._asker.ask(lambda: inner.lookup(keys)).answer()
        except StoreError as error:
            self._go_down(error)
            raise

    def open(self, key: ChunkKey) -> ChunkReader:
        return _MemberReader(self, self.attempt(lambda inner: inner.open(key)))

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        return self.attempt(lambda inner: inner.write(key, data))

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        return self.attempt(lambda inner: inner.delete(keys))

    def __iter__(self) -> Iterator[StoredChunk]:
        return iter(self.attempt(list))

    def stats(self) -> StoreStats:
        return self.attempt(lambda inner: inner.stats())

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        self.attempt(lambda inner: inner.remember_identity(root, fields))

    def identities(self) -> dict[str, dict[str, str]]:
        return self.attempt(lambda inner: inner.identities())

    def tidy(self) -> list[str]:
        return self.attempt(lambda inner: inner.tidy())

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            inner, self._inner = self._inner, None
            self._reason = self._reason or "it is closed"
        if inner is not None:
            inner.close()

    def attempt(self, operation: Callable[[Store], Result]) -> Result:
        """Do something with the store, if it is up, and draw conclusions if it fails."""
        inner = self._up()
        try:
            result = operation(inner)
        # Of one chunk, or of all, but not of a tier in trouble.
        except (MissingChunk, NotDeleted, ReadOnly, StoreFull, UnknownKey, Unreadable):
            raise
        except StoreError as error:
            self.failed(error)
            raise
        self._failures = 0
        return result

    def failed(self, error: StoreError) -> None:
        """An operation failed."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._go_down(error)

    def _up(self) -> Store:
        inner, reason = self._inner, self._reason
        if inner is None or reason is not None:
            raise StoreError(f"the {self.name} tier is down and will be tried again: {reason}")
        return inner

    def _opened(self) -> Store:
        if self._inner is None:
            inner = self._open_inner()
            self.name, self.url, self.parallel_reads = inner.name, inner.url, inner.parallel_reads
            self._inner = inner
        return self._inner

    def _go_down(self, error: StoreError) -> None:
        with self._lock:
            if self._reason is None and not self._closed.is_set():
                self._reason = str(error)
                self.retry_s = self._first_retry_s
                emit(_LOG, logging.WARNING, "tier_down", tier=self.name, reason=self._reason)
                threading.Thread(target=self._recover, name=f"cakekv-retry-{self.name}", daemon=True).start()

    def _recover(self) -> None:
        down_at = monotonic()
        while not self._closed.wait(self.retry_s):
            try:
                self._opened().lookup([_PROBE])
            except StoreError as error:
                self._reason = str(error)
                self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)
            else:
                self._failures = 0
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
        return self._member.attempt(lambda _: self._inner.read_into(buffer, offset))
