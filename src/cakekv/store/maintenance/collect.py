"""Chooses what goes from a store that is too large, or holds chunks nobody has asked for in a long time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from operator import attrgetter
from typing import NamedTuple

from cakekv.chunk import PEEK_BYTES, peek_place
from cakekv.errors import CorruptChunk, NotDeleted, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import Store, StoredChunk
from cakekv.store.disk import DiskStore
from cakekv.store.eviction.base import AHEAD_S, Eviction, Held
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.maintenance.listing import listing
from cakekv.store.maintenance.walking import OnBytes, ignore, in_order, unwrapped, walk
from cakekv.store.memory import MemoryStore

_BATCH = 256


class Garbage(NamedTuple):
    """What is to go."""

    old: list[StoredChunk]
    """Not used for too long."""
    surplus: list[StoredChunk]
    """Of the others, those that the store is too large by; the first to go first."""
    undated: int
    """Chunks of which the tier does not know when they were used, or says in the future; they do not count as old."""
    kept_bytes: int
    """Of what stays."""
    troubles: Sequence[str] = ()
    """Why something was left out of account."""


def policy_of(store: Store) -> Eviction:
    """By which a store evicts; the least recently used first where a server decides."""
    for part in walk(store):
        if isinstance(part, DiskStore | MemoryStore):
            return part.policy
    return LeastRecentlyUsed()


def garbage(
    store: Store,
    now: float,
    *,
    capacity: int | None = None,
    older_than_s: float | None = None,
    policy: Eviction | None = None,
) -> Garbage:
    """Choose what is to go; nothing is removed.

    Which model a chunk belongs to cannot be known: its key is a digest, and its header names no model. Chunks that no
    model asks for any more are found by their age. Pinned chunks stay.

    Parameters
    ----------
    store : Store
        Any. In a tiered store each chunk counts once.
    now : float
        Seconds since the epoch.
    capacity : int or None
        Bytes that may stay.
    older_than_s : float or None
        Chunks go that were last used longer ago than so many seconds. Object stores know only when a chunk was written.
    policy : Eviction or None
        In whose order chunks go for the capacity; None: `policy_of`.

    Raises
    ------
    StoreError
        The store failed.
    """
    chunks, troubles = listing(unwrapped(store))  # in their true sizes, also if they are sealed
    pinned: frozenset[ChunkKey] = frozenset()
    with suppress(StoreError):  # which shows in the listing, too
        pinned = store.pins().keys
    old = [chunk for chunk in chunks if older_than_s is not None and 0 < chunk.used_at < now - older_than_s]
    old = [chunk for chunk in old if chunk.key not in pinned]
    gone = {chunk.key for chunk in old}
    rest = [chunk for chunk in chunks if chunk.key not in gone]
    left = sum(chunk.size for chunk in rest)
    surplus: list[StoredChunk] = []
    if capacity is not None and left > capacity:
        for chunk in _ordered(store, rest, now, policy_of(store) if policy is None else policy, pinned):
            if left <= capacity:
                break
            if chunk.size:  # else nothing is won: it is no chunk, which is for `repair` to delete
                surplus.append(chunk)
                left -= chunk.size
    return Garbage(old, surplus, sum(not 0 < chunk.used_at <= now + AHEAD_S for chunk in chunks), left, troubles)


def delete(store: Store, chunks: Sequence[StoredChunk], on_bytes: OnBytes = ignore) -> int:
    """Remove chunks, a few at a time. Returns how many were there.

    Raises
    ------
    NotDeleted
        Some could not be removed; all others are gone.
    StoreError
        The store failed before anything was removed.
    """
    deleted = 0
    left: dict[ChunkKey, str] = {}
    reasons: dict[str, None] = {}
    for start in range(0, len(chunks), _BATCH):
        batch = chunks[start : start + _BATCH]
        try:
            deleted += store.delete([chunk.key for chunk in batch])
        except NotDeleted as error:
            deleted += error.deleted
            left |= error.left
            reasons[str(error)] = None
        except StoreError as error:
            if not deleted and not left:
                raise
            left |= dict.fromkeys((chunk.key for chunk in chunks[start:]), str(error))
            break
        on_bytes(sum(chunk.size for chunk in batch))
    if left:
        raise NotDeleted.of(deleted, left)
    if reasons:
        raise NotDeleted("; ".join(reasons), deleted)
    return deleted


def _ordered(
    store: Store, chunks: list[StoredChunk], now: float, policy: Eviction, pinned: frozenset[ChunkKey]
) -> Iterator[StoredChunk]:
    """Chunks as the policy would let them go; the store's own is not asked, but one that knows as much."""
    judge, stored = deepcopy(policy), {chunk.key: chunk for chunk in chunks}
    judge.spare(pinned)
    for held in list(judge.chunks()):
        if held.key not in stored:
            judge.removed(held.key)
    unknown = [chunk for chunk in sorted(chunks, key=attrgetter("used_at")) if judge.get(chunk.key) is None]
    places = [(0, 1)] * len(unknown)
    if judge.needs_position:
        keys = [chunk.key for chunk in unknown]
        places = [place for _, place in in_order(lambda key: _place(store, key), keys, store.parallel_reads)]
    for chunk, place in zip(unknown, places, strict=True):
        judge.wrote(Held(chunk.key, chunk.size, chunk.used_at, *place))
    while (victim := judge.evict(now)) is not None:
        yield stored[victim.key]


def _place(store: Store, key: ChunkKey) -> tuple[int, int]:
    head = memoryview(bytearray(PEEK_BYTES))
    with suppress(StoreError, CorruptChunk), store.open(key) as reader:
        reader.read_into(head, 0)
    return peek_place(head)
