"""Chunks in pieces: how their layers are cut into groups for a layered finish, and which bytes a piece needs."""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.chunk import ChunkShape
from cakekv.restore.layered import LayerGroups

_MOST_GROUPS = 16
_LEAST_READ_BYTES = 1 << 16
"""A group of layers is at least that much of a chunk, so that reading it in pieces costs little."""


def layer_groups(shape: ChunkShape) -> list[range]:
    """Cut a chunk's layers into groups of about the same size, for a layered finish."""
    layers = len(shape.segment_bytes)
    number = max(1, min(_MOST_GROUPS, layers, sum(shape.segment_bytes) // _LEAST_READ_BYTES))
    ends = [layers * (group + 1) // number for group in range(number)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def group_bytes(shape: ChunkShape, groups: Sequence[range], unwindowed: Sequence[int]) -> LayerGroups:
    """Bytes to read per group; the first one of a chunk brings the header, too."""
    whole = [load_bytes(shape, group, with_header=not number) for number, group in enumerate(groups)]
    needed = [[layer for layer in group if layer in unwindowed] for group in groups]
    part = [load_bytes(shape, layers, with_header=not number) if layers else 0 for number, layers in enumerate(needed)]
    return LayerGroups(tuple(whole), tuple(part))


def load_bytes(shape: ChunkShape, layers: Sequence[int], with_header: bool = True) -> int:
    """Bytes read for a chunk of which only `layers` are needed."""
    return sum(end - start for start, end in byte_ranges(shape, layers, with_header))


def byte_ranges(shape: ChunkShape, layers: Sequence[int], with_header: bool) -> list[tuple[int, int]]:
    """Byte ranges to read, adjacent ones joined; the first begins with the header, if that is wanted."""
    ranges = [(0, shape.header_bytes)] if with_header else []
    for layer in layers:
        start = shape.offsets[layer]
        end = shape.offsets[layer + 1] if layer + 1 < len(shape.offsets) else shape.total_bytes
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges
