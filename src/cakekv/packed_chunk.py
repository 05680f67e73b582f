"""The packed form of a chunk: the bits of the exact form in fewer bytes, under the same key, at the same position."""

from __future__ import annotations

from types import ModuleType

from cakekv.chunk import (
    MAX_CHUNK_BYTES,
    TIGHT,
    ChunkShape,
    Form,
    header_bytes,
    read_header,
    seal,
    segments,
    verify_chunk,
)
from cakekv.errors import BadInput, CannotUnpack, ChunkFault, CorruptChunk
from cakekv.keys import ChunkKey


def kernels() -> ModuleType:
    """What packs and unpacks a segment.

    Raises
    ------
    CannotUnpack
        It needs numba, which is not installed.
    """
    try:
        from cakekv import packing
    except (ImportError, BadInput) as error:
        raise CannotUnpack(
            "packing chunks, and reading those that are packed, needs numba, which is not installed: "
            "pip install 'cakekv[codecs]', or have chunks written with pack=no"
        ) from error
    return packing


def pack_chunk(chunk: memoryview) -> memoryview | None:
    """Pack a chunk.

    Parameters
    ----------
    chunk : memoryview
        A whole chunk in the exact form.

    Returns
    -------
    memoryview or None
        The chunk in the packed form; None if its segments would not be smaller.

    Raises
    ------
    CorruptChunk
        It is not what was sealed.
    CannotUnpack
        What packs is not installed.
    """
    packing = kernels()
    header = verify_chunk(chunk)
    sources = segments(header.shape, chunk)
    begin = header_bytes(len(sources), Form.PACKED)
    packed = memoryview(bytearray(begin + sum(packing.bound(len(source)) + TIGHT for source in sources)))
    lengths = []
    for source in sources:
        lengths.append(packing.pack(source, packed[begin:]) if len(source) else 0)
        begin += -(-lengths[-1] // TIGHT) * TIGHT
    shape = ChunkShape(header.tokens, tuple(lengths), Form.PACKED, header.lengths)
    if sum(lengths) >= sum(header.lengths) or shape.total_bytes >= header.total_bytes:
        return None
    seal(shape, packed, header.key, header.position)
    return packed[: shape.total_bytes]


def unpack_chunk(chunk: memoryview) -> memoryview:
    """Unpack a chunk: the same bits as before it was packed, its header included.

    Raises
    ------
    CorruptChunk
        It is not what was packed.
    CannotUnpack
        What unpacks is not installed.
    """
    header = read_header(chunk, len(chunk))
    if header.shape.form is not Form.PACKED:
        raise BadInput(f"chunk {header.key.short}… is not packed")
    exact = header.shape.exact
    if exact.total_bytes > MAX_CHUNK_BYTES:
        raise CorruptChunk(ChunkFault.OVERLONG, f"unpacked it has {exact.total_bytes} bytes, more than any chunk")
    buffer = memoryview(bytearray(exact.total_bytes))
    unpack_segments(chunk, buffer)
    seal(exact, buffer, header.key, header.position)
    return buffer


def unpack_segments(chunk: memoryview, buffer: memoryview) -> None:
    """Verify and unpack the segments of a packed chunk to where the exact form has them; raises as `unpack_chunk`."""
    kernels()
    shape = verify_chunk(chunk).shape
    pairs = zip(segments(shape, chunk), segments(shape.exact, buffer), strict=True)
    for layer, (packed, segment) in enumerate(pairs):
        unpack_segment(layer, packed, segment)


def unpack_segment(layer: int, packed: memoryview, segment: memoryview) -> None:
    """Fill a layer's segment with what was packed.

    Raises
    ------
    CorruptChunk
        `packed`, which was verified, is not what packing writes, or not a segment of that length.
    CannotUnpack
        What unpacks is not installed.
    """
    from cakekv.codec.base import DamagedCode

    packing = kernels()
    try:
        size = packing.unpacked_size(packed) if len(packed) else 0
        if size != len(segment):
            raise CorruptChunk(
                ChunkFault.WRONG_SHAPE, f"layer {layer} has {size} bytes unpacked, instead of {len(segment)}"
            )
        if size:
            packing.unpack(packed, segment)
    except DamagedCode as damage:
        raise CorruptChunk(ChunkFault.UNDECODABLE, f"layer {layer}: {damage}") from damage


def warm_up() -> None:
    """Have everything compiled.

    Raises
    ------
    CannotUnpack
        What packs is not installed.
    """
    import numpy as np

    shape = ChunkShape(1, (1 << 15,) * 3)
    chunk = memoryview(bytearray(shape.total_bytes))
    values = np.linspace(-2.0, 2.0, 1 << 14, dtype=np.float32)
    wide, half = values[: 1 << 13].tobytes(), values.astype(np.float16).tobytes()
    brain = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for segment, numbers in zip(segments(shape, chunk), (wide, half, brain), strict=True):
        segment[:] = numbers
    seal(shape, chunk, ChunkKey(bytes(ChunkKey.LENGTH)), 0)
    packed = pack_chunk(chunk)
    if packed is not None:
        unpack_chunk(packed)
