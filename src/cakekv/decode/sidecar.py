"""What a sight has worked out of a prompt's stored chunks, stored beside them: a chunk of its own kind.

It is sealed like a chunk (see `chunk.py`), one segment per layer, empty for a layer without groups: bound by its
checksums to its key, which follows from that of the last chunk it is about, to its layer, and to its position. A
segment holds, of each head of keys, how many groups and how wide, the entries group by group, counted from the first,
the groups' sizes, and their marks. What is damaged is worked out anew.

A sidecar that is read as queries ask for it has the *rows* behind that: the keys and values of the same tokens once
more, exact, in segments of their own for the entries of each layer and head that are in no group, and for each group.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from blake3 import blake3

from cakekv.chunk import ChunkHeader, ChunkShape, Form, read_header, seal, segments, verify_chunk
from cakekv.decode.groups import Groups
from cakekv.errors import ChunkFault, CorruptChunk
from cakekv.keys import ChunkKey
from cakekv.layout import LayerLayout

_HEAD = struct.Struct("<5I")
_INDEX, _SIZE, _MARK = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<f4")
INDEX_BYTES, SIZE_BYTES, MARK_BYTES = _INDEX.itemsize, _SIZE.itemsize, _MARK.itemsize
LONGEST = 1 << 16
"""Entries of one sidecar."""


class Rows(NamedTuple):
    """The rows that one segment of a sidecar has."""

    segment: int
    layer: int
    head: int
    positions: torch.Tensor
    """(rows,), int64."""


Planes = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer: its keys and its values, (heads, positions, width) each, from position 0 on."""


class Sidecar(NamedTuple):
    """Which one."""

    key: ChunkKey
    start: int
    """The first position that it is about."""
    end: int
    has_rows: bool = False

    def seal(self, groups: Mapping[int, Groups], layers: int, planes: Planes | None = None) -> memoryview:
        """Write down the groups of entries of some of so many layers; and if it has rows, those of all layers.

        Parameters
        ----------
        groups : mapping of int to Groups
            By layer.
        layers : int
            How many.
        planes : callable or None
            Where rows are taken from.
        """
        parts = [_packed(groups[layer], self.start) if layer in groups else b"" for layer in range(layers)]
        if self.has_rows:
            assert planes is not None
            both = [planes(layer) for layer in range(layers)]
            for rows in self.rows(groups, [one[0].shape[0] for one in both]):
                parts.append(b"".join(_bytes(plane[rows.head, rows.positions]) for plane in both[rows.layer]))
        shape = ChunkShape(self.end - self.start, tuple(map(len, parts)), Form.CODED)
        buffer = memoryview(bytearray(shape.total_bytes))
        for segment, part in zip(segments(shape, buffer), parts, strict=True):
            segment[:] = part
        seal(shape, buffer, self.key, self.start)
        return buffer

    def read(self, data: memoryview, heads: Mapping[int, int]) -> dict[int, Groups]:
        """The groups that were written down, of every layer in `heads`, which has so many heads of keys.

        Raises
        ------
        CorruptChunk
            It cannot be trusted.
        """
        header = verify_chunk(data)
        self._expect(header)
        return self._groups(segments(header.shape, data), heads)

    def read_beginning(self, data: memoryview, size: int, layers: Sequence[LayerLayout]) -> Beginning:
        """The groups of one that has rows, and where these are.

        Parameters
        ----------
        data : memoryview
            Its beginning, up to the end of the last layer's groups, of which there are none for some layers.
        size : int
            Bytes of all of it.
        layers : sequence of LayerLayout
            What the model's layers keep.

        Raises
        ------
        CorruptChunk
            It cannot be trusted.
        """
        header = read_header(data, size)
        self._expect(header)
        lengths, offsets = header.lengths, header.offsets
        if len(lengths) <= len(layers) or len(data) < offsets[len(layers)]:
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"{len(lengths)} segments for {len(layers)} layers")
        parts = [data[offset : offset + length] for offset, length in zip(offsets, lengths, strict=True)]
        parts = parts[: len(layers)]
        for layer, part in enumerate(parts):
            header.verify(layer, part)
        heads = {number: layer.planes[0].heads for number, layer in enumerate(layers) if parts[number]}
        groups = self._groups(parts, heads)
        rows = self.rows(groups, [layer.planes[0].heads for layer in layers])
        sizes = [sum(plane.width * plane.itemsize for plane in layer.planes) for layer in layers]
        if [len(one.positions) * sizes[one.layer] for one in rows] != list(lengths[len(layers) :]):
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, "its rows are not those of its groups")
        return Beginning(header, groups, rows)

    def rows(self, groups: Mapping[int, Groups], heads: Sequence[int]) -> list[Rows]:
        """Which rows its segments have, in their order, of layers with so many heads of keys each."""
        span, rows, segment = torch.arange(self.start, self.end, device="cpu"), list[Rows](), len(heads)
        for layer, count in enumerate(heads):
            known = groups.get(layer)
            for head in range(count):
                parts = [span]
                if known is not None:
                    order = known.order[head].cpu()
                    parts = [span[: len(span) - len(order)], *torch.split(order, known.sizes[head].tolist())]
                rows += (Rows(segment + number, layer, head, part) for number, part in enumerate(parts))
                segment += len(parts)
        return rows

    def _expect(self, header: ChunkHeader) -> None:
        header.expect(ChunkShape(self.end - self.start, header.lengths, Form.CODED), self.key, self.start)

    def _groups(self, parts: Sequence[memoryview], heads: Mapping[int, int]) -> dict[int, Groups]:
        if missing := heads.keys() - set(range(len(parts))):
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"it has {len(parts)} layers, and not {min(missing)}")
        return {layer: _unpacked(parts[layer], self, heads[layer]) for layer in heads}


class Beginning(NamedTuple):
    """What a sidecar with rows says of them."""

    header: ChunkHeader
    groups: dict[int, Groups]
    rows: list[Rows]


def sidecar_key(chunk: ChunkKey, fingerprint: str) -> ChunkKey:
    """The key of what is stored beside a chunk, of the sight that the fingerprint names."""
    return ChunkKey(blake3(chunk + fingerprint.encode(), derive_key_context="cakekv sidecar").digest())


def placed(rows: Rows, segment: memoryview, planes: Sequence[torch.Tensor]) -> None:
    """Put a segment's rows where they belong in a layer's planes, (heads, positions, width) each."""
    begin = 0
    for plane in planes:
        end = begin + len(rows.positions) * plane.shape[2] * plane.itemsize
        values = torch.frombuffer(segment[begin:end], dtype=plane.dtype).view(-1, plane.shape[2])
        plane[rows.head, rows.positions.to(plane.device)] = values.to(plane.device)
        begin = end


def _bytes(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _packed(groups: Groups, start: int) -> bytes:
    heads, entries = groups.order.shape
    _, count, width = groups.marks[0].shape
    marks = torch.stack(groups.marks).float().cpu().numpy().astype(_MARK)
    head = _HEAD.pack(heads, entries, count, len(groups.marks), width)
    order = (groups.order - start).cpu().numpy().astype(_INDEX)
    return head + order.tobytes() + groups.sizes.cpu().numpy().astype(_SIZE).tobytes() + marks.tobytes()


def _unpacked(segment: memoryview, sidecar: Sidecar, heads: int) -> Groups:
    if len(segment) < _HEAD.size:
        raise CorruptChunk(ChunkFault.WRONG_SHAPE, "it says nothing of a layer")
    said, entries, count, kinds, width = _HEAD.unpack_from(segment)
    sizes_at = _HEAD.size + said * entries * _INDEX.itemsize
    marks_at = sizes_at + said * count * _SIZE.itemsize
    end = marks_at + kinds * said * count * width * _MARK.itemsize
    span = sidecar.end - sidecar.start
    if said != heads or entries > span or len(segment) != end:
        raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"{entries} entries in {count} groups of {said} heads")
    order = np.frombuffer(segment[_HEAD.size : sizes_at], _INDEX).reshape(heads, entries).astype(np.int64)
    sizes = np.frombuffer(segment[sizes_at:marks_at], _SIZE).reshape(heads, count).astype(np.int64)
    marks = np.frombuffer(segment[marks_at:], _MARK).reshape(kinds, heads, count, width)
    expected = np.arange(span - entries, span)  # the first tokens of a text are in no group
    if (np.sort(order) != expected).any() or (sizes.sum(1) != entries).any():
        raise CorruptChunk(ChunkFault.WRONG_SHAPE, "not every entry is in one group")
    return Groups(
        sidecar.end,
        torch.from_numpy(order + sidecar.start),
        torch.from_numpy(sizes),
        tuple(torch.from_numpy(np.array(mark, np.float32)) for mark in marks),
    )
