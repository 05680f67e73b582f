"""Reads every chunk of a store, and removes what cannot be trusted."""

from __future__ import annotations

from dataclasses import dataclass, field

from cakekv.chunk import is_packed
from cakekv.errors import CorruptChunk, MissingChunk, NotDeleted, StoreError, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.packed_chunk import unpack_chunk
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.listing import Patience, listing
from cakekv.store.maintenance.reading import read_chunk
from cakekv.store.maintenance.walking import OnBytes, ignore, in_order, separate_tiers, undoubted, unwrapped


@dataclass
class Condition:
    """What was found in one tier."""

    tier: str
    chunks: int = 0
    """Those that could be read, sound or not."""
    bytes: int = 0
    """Of those."""
    corrupt: dict[ChunkKey, str] = field(default_factory=dict)
    """What is wrong with each."""
    unreadable: dict[ChunkKey, str] = field(default_factory=dict)
    """Why the tier did not deliver each; whether they are sound cannot be told."""
    unopenable: list[ChunkKey] = field(default_factory=list)
    """Sealed with a key that is not in the keyring; whether they are sound cannot be told."""
    vanished: int = 0
    """Evicted or deleted meanwhile."""
    error: str | None = None
    """Why the tier could not be asked, or not about everything."""


@dataclass
class Repair:
    """What was done to one tier."""

    found: Condition
    deleted: int = 0
    """Chunks."""
    tidied: list[str] = field(default_factory=list)
    """What was found and done beside the chunks, in sentences."""


def verify(store: Store, on_bytes: OnBytes = ignore) -> list[Condition]:
    """Read every chunk of every tier, and check every byte; what is packed is unpacked, too.

    Parameters
    ----------
    store : Store
        Any.
    on_bytes : callable
        Told of progress.

    Returns
    -------
    list of Condition
        One for each tier: of a tiered store several, else one.

    Raises
    ------
    StoreError
        The store failed. A failing tier of a tiered store is noted in its `error` instead.
    """
    tiers = separate_tiers(store)
    return [_verify(tier, on_bytes, alone=len(tiers) == 1) for tier in tiers]


def repair(store: Store, on_bytes: OnBytes = ignore, *, drop_unopenable: bool = False) -> list[Repair]:
    """Remove what dead writers left, then what cannot be trusted of every tier.

    Parameters
    ----------
    store, on_bytes
        As in `verify`.
    drop_unopenable : bool
        Whether chunks that are sealed with keys that are not given are removed, too.

    Raises
    ------
    StoreError
        As in `verify`.
    """
    repairs = []
    tiers = separate_tiers(store)
    for tier in tiers:
        try:
            tidied = tier.tidy()
        except StoreError as error:
            if len(tiers) == 1:
                raise
            repairs.append(Repair(Condition(tier.name, error=str(error))))
            continue
        done = Repair(_verify(tier, on_bytes, alone=len(tiers) == 1), tidied=tidied)
        repairs.append(done)
        removed = [*done.found.corrupt, *(done.found.unopenable if drop_unopenable else ())]
        try:
            done.deleted = tier.delete(removed)
        except NotDeleted as error:
            done.deleted, done.found.error = error.deleted, str(error)
        except StoreError as error:
            if len(tiers) == 1:
                raise
            done.found.error = str(error)
    return repairs


def _verify(tier: Store, on_bytes: OnBytes, *, alone: bool) -> Condition:
    condition, patience = Condition(tier.name), Patience()
    tier = undoubted(tier)
    try:
        listed = listing(unwrapped(tier))  # also those of which an encrypted store sees that they are none
        condition.error = "; ".join(listed.troubles) or None
        for chunk, trouble in in_order(lambda chunk: _trouble(tier, chunk), listed.chunks, tier.parallel_reads):
            on_bytes(chunk.size)
            if isinstance(trouble, MissingChunk):
                condition.vanished += 1
                continue
            if isinstance(trouble, StoreError) and not isinstance(trouble, UnknownKey):
                patience.failed(trouble)
                condition.unreadable[chunk.key] = str(trouble)
                continue
            patience.went_well()
            condition.chunks += 1
            condition.bytes += chunk.size
            if isinstance(trouble, UnknownKey):
                condition.unopenable.append(chunk.key)
            elif trouble is not None:
                condition.corrupt[chunk.key] = str(trouble)
        if patience.first is not None and not condition.chunks:
            raise patience.first
    except StoreError as error:
        if alone:
            raise
        condition.error = str(error)
    return condition


def _trouble(tier: Store, chunk: StoredChunk) -> CorruptChunk | StoreError | None:
    try:
        data = read_chunk(tier, chunk.key)
        if is_packed(len(data)):
            unpack_chunk(data)
    except (CorruptChunk, StoreError) as error:
        return error
    return None
