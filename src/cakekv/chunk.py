"""What a chunk is on disk and on the wire: a header, then one segment of bytes per layer.

    offset 0     magic, format version, layer count, header length, total length, key, first position, tokens,
                 checksum of the header
    offset 96    per layer: offset, length and checksum of its segment; if that is packed, its length unpacked, too
    ...          zeros up to a multiple of 4096; then the segments, in order, each padded with zeros likewise

All numbers are little-endian. The version number is the chunk's `Form`: the cache's own bytes, a codec's codes, or the
cache's own bytes with each segment packed without loss (`packed_chunk.py`). Every segment starts where the one before
ended, rounded up, so that each form of a chunk is valid in one way only. Segments that a codec or packing made short
are padded to multiples of 64 only. The whole of a chunk is a multiple of 4096; of a packed one it never is, so that a
size tells whether a chunk is packed. A segment's checksum covers the chunk's key, position and tokens and the segment's
index beside the bytes, of a packed one its unpacked length, too: the right bytes in the wrong place do not pass. The
checksums find damage and mix-ups, not forgeries.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NoReturn

from xxhash import xxh3_128

from cakekv.errors import BadInput, ChunkFault, CorruptChunk
from cakekv.keys import FORMAT_VERSION, ChunkKey

__all__ = [
    "ALIGNMENT",
    "FORMAT_VERSION",
    "MAX_CHUNK_BYTES",
    "ChunkHeader",
    "ChunkShape",
    "Form",
    "header_bytes",
    "header_bytes_of",
    "is_packed",
    "peek_form",
    "peek_place",
    "read_header",
    "seal",
    "segments",
    "verify_chunk",
]

ALIGNMENT = 4096
"""Bytes. What direct I/O wants of offsets and lengths."""
TIGHT = 64
"""Bytes. What segments that a codec or packing made short are rounded up to."""
MAX_CHUNK_BYTES = 4 << 30
"""What is longer is not read as a chunk where nothing else says how long it should be."""
MAGIC = b"\x89CAKEKV\n"
MAX_LAYERS = 2**16
MAX_TOKENS = 2**32
MAX_POSITION = 2**63

_FIXED = struct.Struct("<8sIIQQ32sQQ")
_CHECKSUM = struct.Struct("16s")
PEEK_BYTES = _FIXED.size
"""How much of a chunk `peek_place` wants."""
_ENTRY = struct.Struct("<QQ16s")
_PACKED_ENTRY = struct.Struct("<QQ16sQ")
_TABLE_OFFSET = _FIXED.size + _CHECKSUM.size
_BINDING = struct.Struct("<32sQQI")
_ZEROS = bytes(2 * ALIGNMENT)


class Form(IntEnum):
    """What a chunk's segments hold; its number is the version in the header."""

    EXACT = FORMAT_VERSION
    """The cache's own bytes."""
    CODED = 2
    """What a codec made of them."""
    PACKED = 3
    """The cache's own bytes, packed without loss."""


_VERSIONS = frozenset(form.value for form in Form)


def is_packed(size: int) -> bool:
    """Whether a chunk of `size` bytes is in the packed form."""
    return size % ALIGNMENT != 0


def _aligned(size: int, multiple: int = ALIGNMENT) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class ChunkShape:
    """How large a chunk is, layer by layer.

    Parameters
    ----------
    tokens : int
        Tokens in the chunk.
    segment_bytes : tuple of int
        Bytes of each layer's segment; 0 for a layer that keeps nothing of its own.
    form : Form
        What they hold.
    unpacked_bytes : tuple of int
        Bytes that each segment has unpacked; only of the packed form.

    Raises
    ------
    BadInput
        A number is out of the range that a header can hold.
    """

    tokens: int
    segment_bytes: tuple[int, ...]
    form: Form = Form.EXACT
    unpacked_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.tokens < MAX_TOKENS:
            raise BadInput(f"a chunk holds 1 to {MAX_TOKENS - 1} tokens, not {self.tokens}")
        if not 1 <= len(self.segment_bytes) <= MAX_LAYERS:
            raise BadInput(f"a chunk has 1 to {MAX_LAYERS} layers, not {len(self.segment_bytes)}")
        if min(self.segment_bytes) < 0 or sum(self.segment_bytes) == 0:
            raise BadInput("a chunk's segments cannot have negative lengths or all be empty")
        if len(self.unpacked_bytes) != (len(self.segment_bytes) if self.form is Form.PACKED else 0):
            raise BadInput("a chunk in the packed form, and no other, says how long each segment is unpacked")
        if min(self.unpacked_bytes, default=0) < 0:
            raise BadInput("a chunk's segments cannot have negative lengths")

    @cached_property
    def header_bytes(self) -> int:
        """Length of the header with its padding: where the first segment starts."""
        return header_bytes(len(self.segment_bytes), self.form)

    @property
    def exact(self) -> ChunkShape:
        """Of the packed form: what it unpacks to."""
        return ChunkShape(self.tokens, self.unpacked_bytes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each segment starts, in bytes from the start of the chunk."""
        offsets = []
        end = self.header_bytes
        multiple = ALIGNMENT if self.form is Form.EXACT else TIGHT
        for length in self.segment_bytes:
            offsets.append(end)
            end += _aligned(length, multiple)
        return tuple(offsets)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each segment ends with its padding, in bytes from the start of the chunk."""
        return (*self.offsets[1:], self.total_bytes)

    @cached_property
    def total_bytes(self) -> int:
        """Length of the whole chunk, padding included."""
        end = self.offsets[-1] + self.segment_bytes[-1]
        if self.form is not Form.PACKED:
            return _aligned(end)
        end = _aligned(end, TIGHT)
        return end if is_packed(end) else end + TIGHT


@dataclass(frozen=True)
class ChunkHeader:
    """A header that has been checked in itself; whether it is the wanted chunk's is for `expect` to say."""

    key: ChunkKey
    position: int
    shape: ChunkShape
    checksums: tuple[bytes, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the chunk."""
        return self.shape.tokens

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer's segment starts, in bytes from the start of the chunk."""
        return self.shape.offsets

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each layer's segment."""
        return self.shape.segment_bytes

    @property
    def total_bytes(self) -> int:
        """Length of the whole chunk."""
        return self.shape.total_bytes

    def expect(self, shape: ChunkShape, key: ChunkKey, position: int) -> None:
        """Raise `CorruptChunk` unless this is the header of that chunk, at that position, in that shape."""
        if self.key != key:
            _fail(ChunkFault.WRONG_KEY, f"{self.key.short}… instead of {key.short}…")
        if self.position != position:
            _fail(ChunkFault.WRONG_POSITION, f"{self.position} instead of {position}")
        if self.shape != shape:
            _fail(
                ChunkFault.WRONG_SHAPE,
                f"{self.tokens} tokens and {sum(self.lengths)} bytes in {len(self.lengths)} layers instead of "
                f"{shape.tokens} and {sum(shape.segment_bytes)} in {len(shape.segment_bytes)}",
            )

    def verify(self, layer: int, segment: memoryview) -> None:
        """Raise `CorruptChunk` unless `segment` holds the bytes that were sealed for `layer`."""
        if _segment_checksum(self.shape, self.key, self.position, layer, segment) != self.checksums[layer]:
            _fail(ChunkFault.SEGMENT_CHECKSUM, f"layer {layer} of chunk {self.key.short}…")


def peek_place(data: bytes | memoryview) -> tuple[int, int]:
    """First position and tokens of the chunk that begins with `data`, unchecked: to choose by, not to trust.

    (0, 1) if there is no header.
    """
    if peek_form(data) is None:
        return 0, 1
    *_, position, tokens = _FIXED.unpack_from(data)
    return position, max(tokens, 1)


def peek_form(data: bytes | memoryview) -> Form | None:
    """The form of the chunk that begins with `data`, unchecked; None if there is no header."""
    if len(data) < _FIXED.size:
        return None
    magic, version, *_ = _FIXED.unpack_from(data)
    return Form(version) if magic == MAGIC and version in _VERSIONS else None


def segments(shape: ChunkShape, buffer: memoryview) -> list[memoryview]:
    """Views of each layer's segment in a buffer that holds, or will hold, a whole chunk."""
    return [buffer[offset : offset + length] for offset, length in zip(shape.offsets, shape.segment_bytes, strict=True)]


def seal(shape: ChunkShape, buffer: memoryview, key: ChunkKey, position: int) -> None:
    """Make a chunk of the segments in `buffer`: write the header and the padding around them.

    Parameters
    ----------
    shape : ChunkShape
        The chunk's shape.
    buffer : memoryview
        Writable, contiguous, format "B", at least `shape.total_bytes` long; the chunk is its beginning.
    key : ChunkKey
        The chunk's key.
    position : int
        Position of its first token.

    Raises
    ------
    BadInput
        The buffer is too short or the position out of range.
    """
    if len(buffer) < shape.total_bytes:
        raise BadInput(f"a chunk of {shape.total_bytes} bytes does not fit a buffer of {len(buffer)}")
    if not 0 <= position < MAX_POSITION:
        raise BadInput(f"a chunk's position is from 0 to 2**63 - 1, not {position}")
    header = buffer[: shape.header_bytes]
    header[:] = bytes(len(header))
    layers = len(shape.segment_bytes)
    _FIXED.pack_into(header, 0, MAGIC, shape.form, layers, len(header), shape.total_bytes, key, position, shape.tokens)
    entry = _entry(shape.form)
    for layer, segment in enumerate(segments(shape, buffer)):
        offset, length = shape.offsets[layer], len(segment)
        padding = shape.ends[layer] - offset - length
        buffer[offset + length : offset + length + padding] = _ZEROS[:padding]
        checksum = _segment_checksum(shape, key, position, layer, segment)
        unpacked = shape.unpacked_bytes[layer : layer + 1]
        entry.pack_into(header, _TABLE_OFFSET + layer * entry.size, offset, length, checksum, *unpacked)
    _CHECKSUM.pack_into(header, _FIXED.size, _header_checksum(header))


def header_bytes_of(first_block: memoryview, size: int) -> int:
    """Length of the header of a chunk of unknown shape.

    Parameters
    ----------
    first_block : memoryview
        The chunk's first 4096 bytes, or all of it if it is shorter.
    size : int
        Length of the whole chunk as the store knows it, in bytes.

    Raises
    ------
    CorruptChunk
        It is not the beginning of a chunk that this version reads.
    """
    magic = bytes(first_block[: len(MAGIC)])
    if magic != MAGIC[: len(magic)]:
        _fail(ChunkFault.BAD_MAGIC, f"it starts with {magic!r}")
    if min(len(first_block), size) < ALIGNMENT:
        _fail(ChunkFault.TRUNCATED, f"it has {size} bytes, and the smallest header {ALIGNMENT}")
    _, version, layers, length, *_ = _FIXED.unpack_from(first_block)
    if version not in _VERSIONS:
        readable = ", ".join(str(form.value) for form in Form)
        _fail(ChunkFault.UNSUPPORTED_VERSION, f"version {version}; this cakekv reads versions {readable}")
    if not 1 <= layers <= MAX_LAYERS or length != header_bytes(layers, Form(version)):
        _fail(ChunkFault.HEADER_OUT_OF_RANGE, f"{layers} layers in a header of {length} bytes")
    if size < length:
        _fail(ChunkFault.TRUNCATED, f"it has {size} bytes, and its header {length}")
    return int(length)


def read_header(head: memoryview, size: int) -> ChunkHeader:
    """Check a chunk's header in every way that needs no other knowledge, and only then take it apart.

    Parameters
    ----------
    head : memoryview
        The chunk's beginning: the whole header at least.
    size : int
        Length of the whole chunk as the store knows it, in bytes.

    Raises
    ------
    CorruptChunk
        Which check failed. Nothing larger than `head` is allocated before that is known.
    """
    header_bytes = header_bytes_of(head, size)
    if len(head) < header_bytes:
        _fail(ChunkFault.WRONG_SHAPE, f"its header has {header_bytes} bytes instead of {len(head)}")
    head = head[:header_bytes]
    if _CHECKSUM.unpack_from(head, _FIXED.size)[0] != _header_checksum(head):
        _fail(ChunkFault.HEADER_CHECKSUM, f"in {header_bytes} bytes")
    _, version, layers, _, total_bytes, key, position, tokens = _FIXED.unpack_from(head)
    if not 1 <= tokens < MAX_TOKENS or position >= MAX_POSITION:
        _fail(ChunkFault.HEADER_OUT_OF_RANGE, f"{tokens} tokens at position {position}")
    form = Form(version)
    entry = _entry(form)
    table_end = _TABLE_OFFSET + layers * entry.size
    offsets, lengths, checksums, *unpacked = zip(*entry.iter_unpack(head[_TABLE_OFFSET:table_end]), strict=True)
    if not any(lengths):
        _fail(ChunkFault.HEADER_OUT_OF_RANGE, "every segment is empty")
    shape = ChunkShape(tokens, lengths, form, *unpacked)
    for layer, offset in enumerate(offsets):
        if offset != shape.offsets[layer]:
            _fail(
                ChunkFault.SEGMENT_MISPLACED,
                f"layer {layer}: {lengths[layer]} bytes at {offset} instead of {shape.offsets[layer]}",
            )
    if total_bytes != shape.total_bytes:
        _fail(
            ChunkFault.SEGMENT_MISPLACED,
            f"the segments end at {shape.total_bytes}, the chunk, as its header says, at {total_bytes}",
        )
    if bytes(head[table_end:]) != bytes(header_bytes - table_end):
        _fail(ChunkFault.DIRTY_PADDING, "behind the header's table")
    if size != total_bytes:
        fault = ChunkFault.TRUNCATED if size < total_bytes else ChunkFault.OVERLONG
        _fail(fault, f"it has {size} bytes instead of {total_bytes}")
    return ChunkHeader(ChunkKey(key), position, shape, checksums)


def verify_chunk(buffer: memoryview) -> ChunkHeader:
    """Check a whole chunk, every byte of it, with no knowledge of the model. What is packed is not unpacked.

    Raises
    ------
    CorruptChunk
        Which check failed.
    """
    header = read_header(buffer, len(buffer))
    for layer, segment in enumerate(segments(header.shape, buffer)):
        header.verify(layer, segment)
        end = header.offsets[layer] + len(segment)
        padding = buffer[end : header.shape.ends[layer]]
        if padding != _ZEROS[: len(padding)]:
            _fail(ChunkFault.DIRTY_PADDING, f"after layer {layer} of chunk {header.key.short}…")
    return header


def header_bytes(layers: int, form: Form) -> int:
    """Length of the header of a chunk of so many layers, with its padding."""
    return _aligned(_TABLE_OFFSET + layers * _entry(form).size)


def _entry(form: Form) -> struct.Struct:
    return _PACKED_ENTRY if form is Form.PACKED else _ENTRY


def _header_checksum(header: memoryview) -> bytes:
    """Of the whole header but for the checksum itself."""
    checksum = xxh3_128(header[: _FIXED.size])
    checksum.update(header[_TABLE_OFFSET:])
    return checksum.digest()


def _segment_checksum(shape: ChunkShape, key: ChunkKey, position: int, layer: int, segment: memoryview) -> bytes:
    checksum = xxh3_128(_BINDING.pack(key, position, shape.tokens, layer))
    if shape.form is Form.PACKED:
        checksum.update(shape.unpacked_bytes[layer].to_bytes(8, "little"))
    checksum.update(segment)
    return checksum.digest()


def _fail(fault: ChunkFault, detail: str) -> NoReturn:
    raise CorruptChunk(fault, detail)
