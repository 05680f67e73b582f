"""Cuts chunks into pieces: groups of layers for a layered finish, and the bytes that each piece needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cakekv.chunk import ALIGNMENT, ChunkShape, Form
from cakekv.codec.coder import ChunkCoder
from cakekv.restore.level_choice import LayerGroups, Level

_MOST_GROUPS = 16
_LEAST_READ_BYTES = 1 << 18
"""A group of layers is at least that much of a chunk: each is a request, which costs server and client some time."""


def layer_groups(shape: ChunkShape, layers: int | None = None) -> list[range]:
    """Cut a chunk's layers (by default one per segment) into groups of about the same size, for a layered finish."""
    layers = layers or len(shape.segment_bytes)
    number = max(1, min(_MOST_GROUPS, layers, sum(shape.segment_bytes) // _LEAST_READ_BYTES))
    ends = [layers * (group + 1) // number for group in range(number)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def group_bytes(
    shape: ChunkShape,
    groups: Sequence[range],
    unwindowed: Sequence[int],
    segments_of: Callable[[Sequence[int]], Sequence[int]] = lambda layers: layers,
) -> LayerGroups:
    """Bytes to read per group; the first one of a chunk brings the header, too. `segments_of` is of layers."""

    def size(number: int, layers: Sequence[int]) -> int:
        return load_bytes(shape, segments_of(layers), with_header=not number) if layers else 0

    whole = [size(number, group) for number, group in enumerate(groups)]
    part = [size(number, [layer for layer in group if layer in unwindowed]) for number, group in enumerate(groups)]
    return LayerGroups(tuple(whole), tuple(part))


def levels_of(
    coder: ChunkCoder, shape: ChunkShape, unwindowed: Sequence[int], groups: Sequence[range], least_parts: int
) -> list[Level]:
    """The ways to read chunks of this shape, from `least_parts` parts of what the codec wrote to as many as it says."""
    most = coder.codec.parts_read
    levels = []
    for parts in range(min(least_parts, most) if shape.form is Form.CODED else most, most + 1):
        segments_of = partial(coder.segments_of, shape, parts=parts)
        levels.append(
            Level(
                parts if parts < most else None,
                load_bytes(shape, segments_of(range(coder.layers))),
                load_bytes(shape, segments_of(unwindowed)),
                group_bytes(shape, groups, unwindowed, segments_of) if len(groups) > 1 else None,
            )
        )
    return levels


def load_bytes(shape: ChunkShape, indices: Sequence[int], with_header: bool = True) -> int:
    """Bytes read for a chunk of which only these segments are needed."""
    return sum(end - start for start, end in byte_ranges(shape, indices, with_header))


def byte_ranges(shape: ChunkShape, indices: Sequence[int], with_header: bool) -> list[tuple[int, int]]:
    """Byte ranges to read, adjacent ones joined; the first begins with the header, if that is wanted."""
    ranges = [(0, shape.header_bytes)] if with_header else []
    for index in indices:
        start = shape.offsets[index] // ALIGNMENT * ALIGNMENT
        end = -(-shape.ends[index] // ALIGNMENT) * ALIGNMENT
        if ranges and ranges[-1][1] >= start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges
