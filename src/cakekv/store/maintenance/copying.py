"""Copies chunks from one store to another, whatever kind each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cakekv.errors import CorruptChunk, MissingChunk, StoreError, StoreFull, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.listing import Patience, listing
from cakekv.store.maintenance.reading import read_anywhere
from cakekv.store.maintenance.walking import OnBytes, ignore, in_order, newest

_LOOKED_UP = 512


@dataclass
class Copied:
    """What became of the chunks that were to be copied."""

    chunks: int = 0
    """Copied."""
    bytes: int = 0
    """Of those."""
    present: int = 0
    """That were there already."""
    declined: int = 0
    """That the other store chose not to keep."""
    vanished: int = 0
    """That were evicted or deleted meanwhile."""
    corrupt: dict[ChunkKey, str] = field(default_factory=dict)
    """That were not copied, because they cannot be trusted, or not be opened."""
    failed: dict[ChunkKey, str] = field(default_factory=dict)
    """That could not be read, or not be written."""
    troubles: list[str] = field(default_factory=list)
    """Why something was left out, in sentences."""


def copy(
    source: Store,
    target: Store,
    chunks: Sequence[StoredChunk] | None = None,
    *,
    limit_bytes: int | None = None,
    on_bytes: OnBytes = ignore,
) -> Copied:
    """Copy chunks, each verified in passing, and the notes of whose they are.

    The ones used last are chosen, and of those the oldest are written first: so the other store has them in the same
    order of use, and evicts the right ones. What is there already is not written again, so that a copy that was
    interrupted can be repeated.

    Parameters
    ----------
    source, target : Store
        From, and to.
    chunks : sequence of StoredChunk or None
        Some of the source's; None: all of them.
    limit_bytes : int or None
        No more than so many bytes, those that are there already included; None: as much as the target's capacity.
    on_bytes : callable
        Told of progress.

    Raises
    ------
    StoreError
        Either store failed, or the target is full.
    """
    copied, patience = Copied(), Patience()
    capacity = target.stats().capacity if limit_bytes is None else limit_bytes
    if chunks is None:
        chunks, copied.troubles = listing(source)
    fitting = newest(chunks, capacity)[::-1]
    try:
        for root, fields in source.identities().items():
            target.remember_identity(root, fields)
    except StoreError as error:  # they only serve to explain misses
        copied.troubles.append(str(error))
    workers = max(source.parallel_reads, 1)
    for chunk, outcome in in_order(lambda one: _copy(source, target, *one), _with_presence(target, fitting), workers):
        on_bytes(chunk[0].size)
        if isinstance(outcome, StoreError) and not isinstance(outcome, MissingChunk | UnknownKey):
            patience.failed(outcome)
            copied.failed[chunk[0].key] = str(outcome)
            continue
        patience.went_well()
        if isinstance(outcome, int):
            copied.chunks += 1
            copied.bytes += outcome
        elif isinstance(outcome, CorruptChunk | UnknownKey):
            copied.corrupt[chunk[0].key] = str(outcome)
        elif isinstance(outcome, MissingChunk):
            copied.vanished += 1
        elif chunk[1]:
            copied.present += 1
        else:
            copied.declined += 1
    return copied


def _with_presence(target: Store, chunks: Sequence[StoredChunk]) -> Iterator[tuple[StoredChunk, bool]]:
    """Each chunk, and whether the target has it."""
    for start in range(0, len(chunks), _LOOKED_UP):
        batch = chunks[start : start + _LOOKED_UP]
        for chunk, size in zip(batch, target.lookup([chunk.key for chunk in batch]), strict=True):
            yield chunk, size is not None


def _copy(source: Store, target: Store, chunk: StoredChunk, present: bool) -> int | CorruptChunk | StoreError | None:
    """Bytes written, or why not; None if the target has it, or declines it."""
    if present:
        return None
    try:
        data = read_anywhere(source, chunk.key)
        return len(data) if target.write(chunk.key, data) else None
    except StoreFull:
        raise
    except (CorruptChunk, StoreError) as error:
        return error
