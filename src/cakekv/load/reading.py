"""Reads a chunk, whole or only some of its layers, for the workers of both drivers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cakekv.chunk import ChunkHeader, Form, is_packed, read_header
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import CannotUnpack, CorruptChunk, MissingChunk
from cakekv.keys import ChunkKey
from cakekv.load.pieces import byte_ranges
from cakekv.packed_chunk import kernels
from cakekv.store.base import ChunkReader, Store


class Abandoned(Exception):
    """The load was cancelled in mid-read."""


class Cancellable(Protocol):
    """Something that a reader may be told to give up."""

    @property
    def cancelled(self) -> bool: ...


class Progress:
    """Bytes read so far by one load, whether its chunk is in the coded form, and whether the tier did not answer."""

    bytes = 0
    coded = False
    silent = False


class Wanted(NamedTuple):
    """What is wanted of a chunk."""

    key: ChunkKey
    position: int
    """Of its first token."""
    layers: Sequence[int]
    parts: int | None = None
    """How many parts of what the codec wrote; None: as many as it says."""
    is_piece: bool = False
    """Whether other layers of it are read by themselves."""


Headers = dict[tuple[ChunkKey, Store], ChunkHeader]
"""Of chunks that are read in pieces: the first one brings the header, and those after it do not read it again."""


def read_chunk(
    tier: Store,
    coder: ChunkCoder,
    wanted: Wanted,
    buffer: memoryview,
    load: Cancellable,
    progress: Progress,
    headers: Headers,
) -> ChunkHeader:
    """Read what some layers need, each byte to its own place in the buffer. Segments are not verified yet.

    Parameters
    ----------
    tier : Store
        Where from.
    coder : ChunkCoder
        What a chunk of this model looks like.
    wanted : Wanted
        Which chunk, and what of it.
    buffer : memoryview
        As long as the longest chunk.
    load : Cancellable
        Asked between two slices.
    progress : Progress
        Counts, also if the read ends early.
    headers : Headers
        Those that are known; the chunk's is added if it `is_piece`.

    Returns
    -------
    ChunkHeader
        Checked.

    Raises
    ------
    CorruptChunk
        The header cannot be trusted, or is another chunk's.
    MissingChunk, StoreError
        The tier does not have it, or failed; or it is packed, and what unpacks it is not installed.
    Abandoned
        The load was cancelled.
    """
    known = headers.get((wanted.key, tier)) if wanted.is_piece else None
    with tier.open(wanted.key) as reader:
        if is_packed(reader.size):
            kernels()
        header = _read(reader, coder, wanted, buffer, load, progress, known)
    if wanted.is_piece:
        headers[wanted.key, tier] = header
    progress.coded = header.shape.form is Form.CODED
    return header


def _read(
    reader: ChunkReader,
    coder: ChunkCoder,
    wanted: Wanted,
    buffer: memoryview,
    load: Cancellable,
    progress: Progress,
    header: ChunkHeader | None,
) -> ChunkHeader:
    layers, parts = wanted.layers, wanted.parts
    shape = coder.shape_of(reader.size) if header is None else header.shape
    if shape is not None:
        ranges = byte_ranges(shape, coder.segments_of(shape, layers, parts), with_header=header is None)
    else:  # only the header tells where the layers are
        every = coder.wants_all(reader.size, layers, parts)
        ranges = [(0, reader.size if every else coder.header_bytes(reader.size))]
    for start, end in ranges:
        fill(reader, buffer, start, end, load, progress)
        if header is None:
            header = read_header(buffer[: min(coder.header_bytes(reader.size), reader.size)], reader.size)
            coder.check(header, wanted.key, wanted.position)
    assert header is not None
    if shape is None and not coder.wants_all(reader.size, layers, parts):
        indices = coder.segments_of(header.shape, layers, parts)
        for start, end in byte_ranges(header.shape, indices, with_header=False):
            fill(reader, buffer, start, end, load, progress)
    return header


def fill(reader: ChunkReader, buffer: memoryview, start: int, end: int, load: Cancellable, progress: Progress) -> None:
    """Read a range of a chunk in slices; `Abandoned` is raised between two of them once `load` is cancelled."""
    offset, end = start, min(end, reader.size)
    reader.announce(offset, end)
    while offset < end:
        if load.cancelled:
            raise Abandoned
        count = reader.read_into(buffer[offset : min(offset + reader.slice_bytes, end)], offset)
        if count == 0:
            break
        progress.bytes += count
        offset += count


def failure_reason(error: Exception) -> str:
    """Why a load failed, as reports say it."""
    if isinstance(error, CorruptChunk):
        return f"corrupt: {error.fault.name.lower().replace('_', ' ')}"
    if isinstance(error, MemoryError):
        return f"no memory: {error}"
    if isinstance(error, CannotUnpack):
        return f"packed: {error}"
    return "vanished from the store" if isinstance(error, MissingChunk) else f"store failed: {error}"
