"""Rewrites chunks stored in an older arrangement: under older encryption keys, unencrypted, in other folders, or in
another form than `pack=yes` or `pack=no` asks for.

There is nothing else to rewrite between versions of the chunk format: all that exist are forms, and current.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from cakekv.chunk import PEEK_BYTES, Form, is_packed, peek_form
from cakekv.errors import CorruptChunk, MissingChunk, NoAnswer, StoreError, StoreFull, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.packed_chunk import kernels, pack_chunk, unpack_chunk
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.listing import Patience, listing
from cakekv.store.maintenance.reading import read_chunk
from cakekv.store.maintenance.walking import OnBytes, ignore, in_order, walk
from cakekv.store.packed import Pack, PackedStore, packers
from cakekv.store.striped import StripedStore

if TYPE_CHECKING:
    from cakekv.store.encrypted import EncryptedStore

MOVED, RESEALED, PACKED, UNPACKED, DECLINED, VANISHED = (
    "moved",
    "resealed",
    "packed",
    "unpacked",
    "declined",
    "vanished",
)
_AS_IT_IS = ""


@dataclass
class Migrated:
    """What became of the chunks that were not as they should be."""

    fates: Counter[str] = field(default_factory=Counter)
    """How many were `moved` from a folder in which nobody looks for them; `resealed` with the newest key; `packed` or
    `unpacked`; `declined`, because they do not fit where they should go; `vanished`, evicted or deleted meanwhile."""
    corrupt: dict[ChunkKey, str] = field(default_factory=dict)
    """Those that stay as they were, because they cannot be trusted, or not be opened."""
    failed: dict[ChunkKey, str] = field(default_factory=dict)
    """Those that stay as they were, because they could not be read, or not be written."""
    troubles: list[str] = field(default_factory=list)
    """Why something was left out, in sentences."""


def migrate(store: Store, on_bytes: OnBytes = ignore, *, dry_run: bool = False) -> Migrated:
    """Bring all chunks into the arrangement that the store's options ask for.

    A striped store moves chunks into the folders in which it looks for them, after one was added. An encrypted one
    seals anew what is sealed with another key than the newest, and what is not sealed. One with pack=yes packs what
    becomes smaller by it, and one with pack=no unpacks; with pack=auto, chunks stay in the form that they have. The
    oldest are rewritten first, which keeps their order of use, but for the few that are written at once.

    Parameters
    ----------
    store : Store
        Any.
    on_bytes : callable
        Told of progress.
    dry_run : bool
        Whether to count only what would be rewritten; of what would be packed, some may turn out not to become smaller.

    Raises
    ------
    StoreError
        The store failed, or is full. What was done is done; the rest is as it was.
    """
    migrated = Migrated()
    for striped in [part for part in walk(store) if isinstance(part, StripedStore)]:
        for folder in striped.parts:
            astray = [chunk for chunk in _listed(folder, migrated) if striped.place_of(chunk.key) is not folder]
            if dry_run:
                migrated.fates[MOVED] += len(astray)
            else:
                _rewrite(astray, partial(_move, striped, folder), folder.parallel_reads, migrated, on_bytes)
    for encrypted in _encrypted(store):
        [inner] = encrypted.parts
        asked = in_order(partial(_is_current, encrypted), _listed(inner, migrated), inner.parallel_reads)
        outdated = [chunk for chunk, current in asked if not current]
        if dry_run:
            migrated.fates[RESEALED] += len(outdated)
        else:
            _rewrite(outdated, partial(_reseal, encrypted, inner), inner.parallel_reads, migrated, on_bytes)
    for packer in packers(store):
        if packer.pack is not Pack.AUTO:
            _repack(packer, migrated, on_bytes, dry_run)
    return migrated


def _repack(packer: PackedStore, migrated: Migrated, on_bytes: OnBytes, dry_run: bool) -> None:
    [inner] = packer.parts
    fate = PACKED if packer.packs else UNPACKED
    chunks = [chunk for chunk in _listed(inner, migrated) if not chunk.fault]
    if packer.packs:
        # Whether a codec made it, its size does not tell.
        asked = in_order(partial(_form_of, inner), [one for one in chunks if not is_packed(one.size)], 4)
        chunks = [chunk for chunk, form in asked if form is Form.EXACT]
    else:
        chunks = [chunk for chunk in chunks if is_packed(chunk.size)]
    migrated.fates[fate] += len(chunks) if dry_run else 0
    if chunks and not dry_run:
        kernels()
        _rewrite(chunks, partial(_reform, inner, fate), inner.parallel_reads, migrated, on_bytes)


def _form_of(inner: Store, chunk: StoredChunk) -> Form | None:
    head = memoryview(bytearray(PEEK_BYTES))
    try:
        with inner.open(chunk.key) as reader:
            reader.read_into(head, 0)
    except NoAnswer:
        raise
    except (StoreError, CorruptChunk):
        return Form.EXACT  # which rewriting it will tell more of
    return peek_form(head)


def _reform(inner: Store, fate: str, key: ChunkKey) -> str:
    data = read_chunk(inner, key)
    formed = unpack_chunk(data) if fate == UNPACKED else pack_chunk(data)
    if formed is None:
        return _AS_IT_IS
    return fate if inner.write(key, formed) else DECLINED


def _encrypted(store: Store) -> list[EncryptedStore]:
    try:
        from cakekv.store.encrypted import EncryptedStore
    except ImportError:  # what it needs is not installed, so there is none
        return []
    return [part for part in walk(store) if isinstance(part, EncryptedStore)]


def _rewrite(
    chunks: Iterable[StoredChunk],
    work: Callable[[ChunkKey], str],
    workers: int,
    migrated: Migrated,
    on_bytes: OnBytes,
) -> None:
    patience = Patience()

    def attempt(chunk: StoredChunk) -> str | CorruptChunk | StoreError:
        try:
            return work(chunk.key)
        except MissingChunk:
            return VANISHED
        except StoreFull:
            raise
        except (CorruptChunk, StoreError) as error:
            return error

    oldest_first: Sequence[StoredChunk] = sorted(chunks, key=lambda chunk: chunk.used_at)
    for chunk, outcome in in_order(attempt, oldest_first, workers):
        on_bytes(chunk.size)
        if isinstance(outcome, StoreError) and not isinstance(outcome, UnknownKey):
            patience.failed(outcome)
            migrated.failed[chunk.key] = str(outcome)
            continue
        patience.went_well()
        if outcome == _AS_IT_IS:
            continue
        if isinstance(outcome, str):
            migrated.fates[outcome] += 1
        else:
            migrated.corrupt[chunk.key] = str(outcome)


def _move(striped: StripedStore, former: Store, key: ChunkKey) -> str:
    """Move a chunk as it is: whoever reads it will check it."""
    present = striped.place_of(key)
    if present.lookup([key])[0] is None:
        with former.open(key) as reader:
            data = memoryview(bytearray(reader.size))
            data = data[: reader.read_into(data, 0)]
        if not present.write(key, data):
            return DECLINED
    former.delete([key])
    return MOVED


def _listed(store: Store, migrated: Migrated) -> list[StoredChunk]:
    chunks, troubles = listing(store)
    migrated.troubles += troubles
    return chunks


def _is_current(encrypted: EncryptedStore, chunk: StoredChunk) -> bool:
    try:
        return encrypted.is_current(chunk.key)
    except MissingChunk:
        return True
    except NoAnswer:
        raise
    except (StoreError, CorruptChunk):
        return False  # which resealing it will tell more of


def _reseal(encrypted: EncryptedStore, inner: Store, key: ChunkKey) -> str:
    try:
        data = read_chunk(encrypted, key)
    except CorruptChunk as sealed:
        try:
            data = read_chunk(inner, key)  # it may lie in the open
        except CorruptChunk:
            raise sealed from None
    return RESEALED if encrypted.write(key, data) else DECLINED
