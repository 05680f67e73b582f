"""Turns the bytes of a chunk into segments that can be placed: verifies each, and decodes it if it is coded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cakekv.chunk import ChunkHeader, segments
from cakekv.codec.base import Segment
from cakekv.codec.coder import ChunkCoder
from cakekv.load.reading import Abandoned, Cancellable, Wanted

if TYPE_CHECKING:
    from cakekv.codec.on_device import DeviceDecoder


def decoded_layers(
    coder: ChunkCoder,
    header: ChunkHeader,
    wanted: Wanted,
    buffer: memoryview,
    load: Cancellable,
    decoded: memoryview | None,
    decoder: DeviceDecoder | None = None,
) -> Iterator[tuple[int, Segment]]:
    """Verify and decode what was read of a chunk.

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
        Asked between two layers, if the model's chunks are decoded.
    decoded : memoryview or None
        As long as the longest chunk: holds the layers that are decoded on the CPU. Not needed where there are none.
    decoder : DeviceDecoder or None
        Decodes coded chunks on the model's device; None: the CPU does it, by the calling thread.

    Yields
    ------
    (layer, segment)
        The segment of the exact form, in `buffer` or in `decoded`; or what the decoder made of it.

    Raises
    ------
    CorruptChunk
        A segment is not what was written.
    Abandoned
        The load was cancelled.
    """
    views, layers = segments(header.shape, buffer), wanted.layers

    def verified(layer: int) -> list[memoryview]:
        if load.cancelled and coder.encodes:
            raise Abandoned
        indices = coder.segments_of(header.shape, [layer], wanted.parts)
        for index in indices:
            header.verify(index, views[index])
        return [views[index] for index in indices]

    if not header.shape.packed:
        for layer in layers:
            (segment,) = verified(layer)
            yield layer, segment
    elif decoder is not None:
        yield from zip(layers, decoder.decode(layers, verified), strict=True)
    else:
        assert decoded is not None
        targets = segments(coder.exact, decoded)
        for layer in layers:
            coder.decode(layer, verified(layer), targets[layer], header.position)
            yield layer, targets[layer]
