"""Reads chunks whole and checks all of their bytes, without knowing the model."""

from __future__ import annotations

from cakekv.chunk import ALIGNMENT, MAX_CHUNK_BYTES, ChunkHeader, header_bytes_of, read_header, verify_chunk
from cakekv.errors import ChunkFault, CorruptChunk, MissingChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store
from cakekv.store.maintenance.walking import separate_tiers, undoubted

_WITHOUT_A_LOOK = 64 << 20
"""Of what is longer, the header is checked before memory is set aside for the whole."""


def read_chunk(store: Store, key: ChunkKey) -> memoryview:
    """A chunk's bytes, all of them checked.

    Raises
    ------
    CorruptChunk
        They cannot be trusted.
    MissingChunk
        It is not stored.
    StoreError
        The tier failed, or it is sealed with a key that is not there (`UnknownKey`).
    """
    with store.open(key) as reader:
        if reader.size > _WITHOUT_A_LOOK:
            _check_beginning(reader)
        buffer = memoryview(bytearray(reader.size))
        data = buffer[: reader.read_into(buffer, 0)]
    check_chunk(key, data)
    return data


def read_anywhere(store: Store, key: ChunkKey) -> memoryview:
    """As `read_chunk`, of a tiered store out of the first tier that has it sound; some tiers may be down."""
    corrupt: CorruptChunk | None = None
    failed: StoreError | None = None
    for tier in separate_tiers(store):
        try:
            return read_chunk(undoubted(tier), key)
        except CorruptChunk as error:
            corrupt = corrupt or error
        except StoreError as error:
            failed = error if failed is None or isinstance(error, MissingChunk) else failed
    raise corrupt or failed or MissingChunk(f"chunk {key.short}… is not stored any more")


def check_chunk(key: ChunkKey, data: memoryview) -> None:
    """Raise `CorruptChunk` unless these are the bytes of the chunk of that name."""
    header = verify_chunk(data)
    if header.key != key:
        raise CorruptChunk(ChunkFault.WRONG_KEY, f"it says {header.key.short}…")


def header_of(reader: ChunkReader) -> ChunkHeader:
    """The header of a chunk, checked in itself; raises `CorruptChunk` if it cannot be trusted."""
    block = memoryview(bytearray(ALIGNMENT))
    reader.read_into(block, 0)
    head = memoryview(bytearray(header_bytes_of(block, reader.size)))
    reader.read_into(head, 0)
    return read_header(head, reader.size)


def _check_beginning(reader: ChunkReader) -> None:
    if reader.size > MAX_CHUNK_BYTES:
        raise CorruptChunk(ChunkFault.OVERLONG, f"it has {reader.size} bytes, more than any chunk")
    header_of(reader)
