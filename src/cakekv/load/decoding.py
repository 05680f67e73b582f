"""Turns the bytes of a chunk into segments that can be placed: verifies each, and decodes or unpacks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cakekv.chunk import ChunkHeader, Form, read_header, segments
from cakekv.codec.base import Segment
from cakekv.codec.coder import ChunkCoder
from cakekv.load.reading import Abandoned, Cancellable, Wanted
from cakekv.packed_chunk import unpack_segment

if TYPE_CHECKING:
    from cakekv.codec.on_device import DeviceDecoder


def decoded_layers(
    coder: ChunkCoder,
    header: ChunkHeader,
    wanted: Wanted,
    buffer: memoryview,
    load: Cancellable,
    room: Callable[[], memoryview],
    decoder: DeviceDecoder | None = None,
) -> Iterator[tuple[int, Segment]]:
    """Verify what was read of a chunk, and decode or unpack it.

    Parameters
    ----------
    coder : ChunkCoder
        What a chunk of this model looks like.
    header : ChunkHeader
        The chunk's, checked.
    wanted : Wanted
        What was read of it.
    buffer : memoryview
        What they were read into. It must stay as it is while segments are used.
    load : Cancellable
        Asked between two layers, if they are decoded or unpacked.
    room : callable
        Gives a buffer, as long as the longest chunk, for the layers that the calling thread decodes or unpacks.
    decoder : DeviceDecoder or None
        Decodes coded chunks on the model's device; None: the CPU does it, by the calling thread.

    Yields
    ------
    (layer, segment)
        The segment of the exact form, in `buffer` or in that room; or what the decoder made of it.

    Raises
    ------
    CorruptChunk
        A segment is not what was written.
    CannotUnpack
        It is packed, and what unpacks it is not installed.
    Abandoned
        The load was cancelled.
    """
    views, layers, form = segments(header.shape, buffer), wanted.layers, header.shape.form

    def verified(layer: int) -> list[memoryview]:
        if load.cancelled and (coder.encodes or form is not Form.EXACT):
            raise Abandoned
        indices = coder.segments_of(header.shape, [layer], wanted.parts)
        for index in indices:
            header.verify(index, views[index])
        return [views[index] for index in indices]

    if form is Form.EXACT:
        for layer in layers:
            (segment,) = verified(layer)
            yield layer, segment
    elif form is Form.CODED and decoder is not None:
        yield from zip(layers, decoder.decode(layers, verified), strict=True)
    else:
        targets = segments(coder.exact, room())
        for layer in layers:
            if form is Form.CODED:
                coder.decode(layer, verified(layer), targets[layer], header.position)
            else:
                (packed,) = verified(layer)
                unpack_segment(layer, packed, targets[layer])
            yield layer, targets[layer]


def decoded(
    coder: ChunkCoder, chunk: memoryview, room: memoryview, decoder: DeviceDecoder | None = None
) -> Sequence[Segment]:
    """Decode all layers of a chunk, by the calling thread or by a device; nothing is verified.

    Parameters
    ----------
    coder : ChunkCoder
        Made the chunk.
    chunk : memoryview
        In the coded form.
    room : memoryview
        As long as the exact form: for what the CPU decodes.
    decoder : DeviceDecoder or None
        Decodes instead.

    Returns
    -------
    sequence of Segment
        By layer, as `Engine.place` wants them.
    """
    header = read_header(chunk, len(chunk))
    views = segments(header.shape, chunk)

    def codes(layer: int) -> list[memoryview]:
        return [views[index] for index in coder.segments_of(header.shape, [layer])]

    if decoder is not None:
        return decoder.decode(range(coder.layers), codes)
    targets = segments(coder.exact, room)
    for layer, target in enumerate(targets):
        coder.decode(layer, codes(layer), target, header.position)
    return targets
