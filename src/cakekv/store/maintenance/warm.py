"""Brings chunks to the front of a tiered store before anybody asks for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from cakekv.errors import BadInput, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.copying import Copied, copy
from cakekv.store.maintenance.listing import listing
from cakekv.store.maintenance.walking import OnBytes, ignore, newest, walk
from cakekv.store.memory import MemoryStore
from cakekv.store.tiered import TieredStore


class Warmed(NamedTuple):
    """What became of one tier that chunks are promoted to."""

    tier: str
    copied: Copied | None
    """None if nothing was tried."""
    note: str = ""
    """Why not."""
    failed: bool = False
    """Whether that is because the tier failed."""


def warm(
    store: Store,
    keys: Collection[ChunkKey] | None = None,
    *,
    limit_bytes: int | None = None,
    memory: bool = True,
    on_bytes: OnBytes = ignore,
) -> list[Warmed]:
    """Copy chunks from the tiers behind to those in front that take promotions, as using the chunks would.

    The ones used last are chosen. The tiers behind are filled first, so that what comes from the last may get to the
    first. Nothing is removed from anywhere, but what a full tier evicts.

    Parameters
    ----------
    store : Store
        A tiered one.
    keys : collection of ChunkKey or None
        Which chunks; None: all.
    limit_bytes : int or None
        No more than so many bytes for each tier; None: all that were named by `keys`, else what is free in the tier.
    memory : bool
        Whether memory tiers are filled, which end with the process.
    on_bytes : callable
        Told of progress.

    Returns
    -------
    list of Warmed
        One for each tier with `promote`, but the last one; the nearest to the last tier first.

    Raises
    ------
    BadInput
        The store is not tiered, or a tier has no capacity and nothing else says how much it should get.
    """
    if not isinstance(store, TieredStore):
        raise BadInput("only a tiered store (tiered:///FILE.toml) has tiers to warm")
    warmed = []
    for index in reversed(range(len(store.plan) - 1)):
        front = store.plan[index].member
        if not store.plan[index].promote:
            continue
        if not memory and any(isinstance(part, MemoryStore) for part in walk(front)):
            warmed.append(Warmed(front.name, None, "it is in the memory of the process that uses it"))
            continue
        try:
            limit = _free(front) if limit_bytes is None and keys is None else limit_bytes
            chunks = _behind(store, index, keys)
            limit = sum(chunk.size for chunk in chunks) if limit is None else limit
            warmed.append(Warmed(front.name, copy(store, front, newest(chunks, limit), on_bytes=on_bytes)))
        except StoreError as error:
            warmed.append(Warmed(front.name, None, str(error), failed=True))
    return warmed


def _free(tier: Store) -> int:
    held = tier.stats()
    if held.capacity is None:
        raise BadInput(f"the {tier.name} tier has no capacity to fill: say how many bytes it should get, or which keys")
    return max(0, held.capacity - held.bytes)


def _behind(store: TieredStore, index: int, keys: Collection[ChunkKey] | None) -> list[StoredChunk]:
    """The chunks that are behind a tier and not in it. A tier that fails has none."""
    held = {chunk.key for chunk in listing(store.plan[index].member).chunks}
    found: dict[ChunkKey, StoredChunk] = {}
    for tier in store.plan[index + 1 :]:
        try:
            chunks = listing(tier.member).chunks
        except StoreError:
            continue
        for chunk in chunks:
            if not chunk.fault and chunk.key not in held and (keys is None or chunk.key in keys):
                found.setdefault(chunk.key, chunk)
    return list(found.values())
