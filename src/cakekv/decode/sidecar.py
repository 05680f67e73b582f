"""What a sight has worked out of a prompt's stored chunks, stored beside them: a chunk of its own kind.

It is sealed like a chunk (see `chunk.py`), one segment per layer, empty for a layer without groups: bound by its
checksums to its key, which follows from that of the last chunk it is about, to its layer, and to its position. A
segment holds, of each head of keys, how many groups and how wide, the entries group by group, counted from the first,
the groups' sizes, and their marks. What is damaged is worked out anew.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from blake3 import blake3

from cakekv.chunk import ChunkShape, Form, seal, segments, verify_chunk
from cakekv.decode.groups import Groups
from cakekv.errors import ChunkFault, CorruptChunk
from cakekv.keys import ChunkKey

_HEAD = struct.Struct("<5I")
_INDEX, _SIZE, _MARK = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<f4")
LONGEST = 1 << 16
"""Entries of one sidecar."""


class Sidecar(NamedTuple):
    """Which one."""

    key: ChunkKey
    start: int
    """The first position that it is about."""
    end: int

    def seal(self, groups: Mapping[int, Groups], layers: int) -> memoryview:
        """Write down the groups of entries of some of so many layers."""
        parts = [_packed(groups[layer], self.start) if layer in groups else b"" for layer in range(layers)]
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
        header.expect(ChunkShape(self.end - self.start, header.lengths, Form.CODED), self.key, self.start)
        groups = {}
        for layer, segment in enumerate(segments(header.shape, data)):
            if layer in heads:
                groups[layer] = _unpacked(segment, self, heads[layer])
        if missing := heads.keys() - groups.keys():
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"it has {len(header.lengths)} layers, and not {min(missing)}")
        return groups


def sidecar_key(chunk: ChunkKey, fingerprint: str) -> ChunkKey:
    """The key of what is stored beside a chunk, of the sight that the fingerprint names."""
    return ChunkKey(blake3(chunk + fingerprint.encode(), derive_key_context="cakekv sidecar").digest())


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
