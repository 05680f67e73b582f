"""Walks the parts of a store, and works on many chunks at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cakekv.errors import BadInput
from cakekv.store.base import Store, StoredChunk
from cakekv.store.member import Member
from cakekv.store.tiered import TieredStore
from cakekv.store.wrapper import WrappedStore

Item = TypeVar("Item")
Result = TypeVar("Result")

OnBytes = Callable[[int], None]
"""Told how many bytes of chunks have been dealt with since the last call."""


def ignore(count: int) -> None:
    """Nobody wants to know."""


def walk(store: Store) -> Iterator[Store]:
    """A store, and all that it is made of."""
    yield store
    for part in store.parts:
        yield from walk(part)


def leave_no_trace(store: Store) -> None:
    """From now on, opening a chunk of this store does not count as using it, where the tier can help it."""
    for part in walk(store):
        part.marks_use = False


def separate_tiers(store: Store) -> Sequence[Store]:
    """The stores of which each may hold a copy of the same chunk: a tiered store's tiers, else the store itself."""
    return store.parts if isinstance(store, TieredStore) else [store]


def undoubted(tier: Store) -> Store:
    """A tier, without what would take a few chunks that cannot be read for its end."""
    return tier.parts[0] if isinstance(tier, Member) and tier.is_up else tier


def unwrapped(store: Store) -> Store:
    """The store inside of all that only changes how it is used, or what its chunks look like."""
    while isinstance(store, WrappedStore | Member) and store.parts:  # a member that was never up has none
        store = store.parts[0]
    return store


def chosen(chunks: Iterable[StoredChunk], prefixes: Sequence[str]) -> list[StoredChunk]:
    """The chunks whose keys begin so.

    Parameters
    ----------
    chunks : iterable of StoredChunk
        Those to choose from.
    prefixes : sequence of str
        Beginnings of keys, in hexadecimal.

    Raises
    ------
    BadInput
        One is empty, or not hexadecimal.
    """
    wanted = tuple(prefix.lower() for prefix in prefixes)
    for prefix in wanted:
        if not prefix or set(prefix) - set("0123456789abcdef"):
            raise BadInput(f"{prefix!r} is not the beginning of a key: keys are written in hexadecimal")
    return [chunk for chunk in chunks if chunk.key.hex().startswith(wanted)]


def newest(chunks: Iterable[StoredChunk], limit_bytes: int | None = None) -> list[StoredChunk]:
    """The chunks used last, of no more than so many bytes in all; the newest first."""
    fitting = []
    left = limit_bytes
    for chunk in sorted(chunks, key=lambda chunk: chunk.used_at, reverse=True):
        if left is not None:
            left -= chunk.size
            if left < 0:
                break
        fitting.append(chunk)
    return fitting


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Do something with each item, several at a time; the results in the items' order, no more ahead than workers.

    An exception ends it; what is at work is waited for, and nothing more is begun.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cakekv-maintain")
    ahead: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) > workers:
                done, result = ahead.popleft()
                yield done, result.result()
        while ahead:
            done, result = ahead.popleft()
            yield done, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
