"""A store as one portable file: a tar of chunks and identities that `tar tv` lists.

    cakekv-archive.json     names the version of this arrangement
    identities/ROOT.json    whose chunks these are
    chunks/KEY              a chunk, by its key in hexadecimal; those used last come last

Only the plainest headers of tar are written and read (USTAR, regular files). Nothing in a file decides where anything
is written: chunks go into a store under keys, after their names, lengths and bytes have been checked.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from cakekv.chunk import MAX_CHUNK_BYTES
from cakekv.errors import BadInput, CorruptChunk, MissingChunk, StoreError, StoreFull, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.store.base import Store, StoredChunk
from cakekv.store.identities import MAX_NOTE_BYTES, decode_note, encode_note, is_root
from cakekv.store.maintenance.copying import Copied
from cakekv.store.maintenance.listing import Patience, listing
from cakekv.store.maintenance.reading import check_chunk, read_anywhere
from cakekv.store.maintenance.walking import OnBytes, ignore, in_order

ARCHIVE_VERSION = 1
MARKER = "cakekv-archive.json"

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_CHUNK_NAME = re.compile(r"chunks/([0-9a-f]{64})")
_NOTE_NAME = re.compile(r"identities/([0-9a-f]{64})\.json")
_PART_BYTES = 1 << 20
_LATEST = 8**11 - 1
"""Seconds since the epoch that a header of tar can hold."""


@dataclass
class Imported:
    """What was in an archive."""

    chunks: int = 0
    """Written to the store."""
    bytes: int = 0
    """Of those."""
    present: int = 0
    """That were there already."""
    declined: int = 0
    """That the store chose not to keep."""
    corrupt: dict[ChunkKey, str] = field(default_factory=dict)
    """That were not imported, because they cannot be trusted."""
    failed: dict[ChunkKey, str] = field(default_factory=dict)
    """That could not be written."""
    identities: int = 0
    """Notes of whose chunks these are."""


def export(store: Store, stream: BinaryIO, on_bytes: OnBytes = ignore) -> Copied:
    """Write all chunks of a store to a stream, each verified in passing, and whose they are.

    The stream holds chunks in the open, also those of an encrypted store.

    Parameters
    ----------
    store : Store
        Any.
    stream : binary file
        Written from where it stands to the end; it need not be seekable.
    on_bytes : callable
        Told of progress.

    Returns
    -------
    Copied
        What was written and what was not.

    Raises
    ------
    StoreError
        The store failed.
    OSError
        The stream did.
    """
    copied, patience = Copied(), Patience()
    _write(stream, MARKER, memoryview(_marker()))
    found, copied.troubles = listing(store)
    try:
        identities = store.identities()
    except StoreError as error:  # they only serve to explain misses
        identities = {}
        copied.troubles.append(str(error))
    for root, fields in identities.items():
        if is_root(root):
            _write(stream, f"identities/{root}.json", memoryview(encode_note(root, fields).encode()))
    chunks = sorted(found, key=lambda chunk: chunk.used_at)
    for chunk, data in in_order(lambda chunk: _read(store, chunk), chunks, store.parallel_reads):
        if isinstance(data, StoreError) and not isinstance(data, MissingChunk | UnknownKey):
            patience.failed(data)
            copied.failed[chunk.key] = str(data)
            continue
        patience.went_well()
        if isinstance(data, memoryview):
            _write(stream, f"chunks/{chunk.key.hex()}", data, int(min(max(chunk.used_at, 0.0), _LATEST)))
            copied.chunks += 1
            copied.bytes += len(data)
        elif isinstance(data, MissingChunk):
            copied.vanished += 1
        else:
            copied.corrupt[chunk.key] = str(data)
        on_bytes(chunk.size)
    stream.write(_END)
    return copied


def import_archive(stream: BinaryIO, store: Store, on_bytes: OnBytes = ignore) -> Imported:
    """Write the chunks of an archive to a store. Chunks that are there already are passed over.

    Parameters
    ----------
    stream : binary file
        Read from where it stands; it need not be seekable.
    store : Store
        Any.
    on_bytes : callable
        Told of progress.

    Raises
    ------
    BadInput
        It is no such archive, holds something else, or is cut off. The chunks before that have been imported; each was
        checked.
    StoreError
        The store failed, or is full.
    OSError
        The stream failed.
    """
    imported, patience = Imported(), Patience()
    members = _members(stream)
    name, size = next(members, ("", 0))
    if name != MARKER or size != len(_marker()) or _content(stream, size) != _marker():
        raise BadInput(f"this is not an archive of a store, or of another version: it does not begin with {MARKER}")
    for name, size in members:
        if match := _NOTE_NAME.fullmatch(name):
            fields = decode_note(bytes(_content(stream, _bounded(name, size, MAX_NOTE_BYTES))))
            if fields is not None:
                store.remember_identity(match[1], fields)
                imported.identities += 1
        elif match := _CHUNK_NAME.fullmatch(name):
            data = _content(stream, _bounded(name, size, MAX_CHUNK_BYTES))
            key = ChunkKey(bytes.fromhex(match[1]))
            try:
                _take(store, key, data, imported)
                patience.went_well()
            except StoreFull:
                raise
            except StoreError as error:
                patience.failed(error)
                imported.failed[key] = str(error)
        else:
            raise BadInput(f"{name[:100]!r} in the archive is neither a chunk nor an identity; nothing was made of it")
        on_bytes(size)
    return imported


def _take(store: Store, key: ChunkKey, data: memoryview, imported: Imported) -> None:
    try:
        check_chunk(key, data)
    except CorruptChunk as error:
        imported.corrupt[key] = str(error)
        return
    if store.lookup([key])[0] is not None:
        imported.present += 1
    elif store.write(key, data):
        imported.chunks += 1
        imported.bytes += len(data)
    else:
        imported.declined += 1


def _read(store: Store, chunk: StoredChunk) -> memoryview | CorruptChunk | StoreError:
    try:
        return read_anywhere(store, chunk.key)
    except (CorruptChunk, StoreError) as error:
        return error


def _marker() -> bytes:
    return json.dumps({"cakekv_archive": ARCHIVE_VERSION}).encode()


def _write(stream: BinaryIO, name: str, data: memoryview, modified: int = 0) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), modified, 0o600
    stream.write(member.tobuf(tarfile.USTAR_FORMAT))
    stream.write(data)
    stream.write(bytes(-len(data) % _BLOCK))


def _members(stream: BinaryIO) -> Iterator[tuple[str, int]]:
    """Names and sizes of the members. Whoever gets one reads its content (`_content`) before the next."""
    while True:
        header = bytes(_filled(stream, _BLOCK))
        if header == bytes(_BLOCK):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            raise BadInput(f"this is not an archive of a store: {error}") from None
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise BadInput(
                f"{member.name[:100]!r} in the archive is no plain file; archives of stores hold nothing else"
            )
        yield member.name, member.size


def _bounded(name: str, size: int, most: int) -> int:
    if not 0 <= size <= most:
        raise BadInput(f"{name} in the archive is said to have {size} bytes; {most} are the most")
    return size


def _content(stream: BinaryIO, size: int) -> memoryview:
    data = _filled(stream, size)
    _filled(stream, -size % _BLOCK)
    return data


def _filled(stream: BinaryIO, size: int) -> memoryview:
    """So many bytes. Memory is taken as they come, not for what a header promises."""
    data = bytearray()
    while len(data) < size:
        part = stream.read(min(_PART_BYTES, size - len(data)))
        if not part:
            raise BadInput("the archive is cut off: it ends before its end is marked")
        data += part
    return memoryview(data)
