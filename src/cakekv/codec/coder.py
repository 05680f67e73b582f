"""Turns a chunk of a model's cache into the chunk that is stored, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import cast

import numpy as np

from cakekv.chunk import TIGHT, ChunkHeader, ChunkShape, Form, header_bytes, is_packed, read_header, seal, segments
from cakekv.codec.base import LARGEST, Code, Codec, DamagedCode, Plane, Values
from cakekv.errors import BadInput, CannotEncode, ChunkFault, CorruptChunk, UnknownRotation
from cakekv.keys import ChunkKey
from cakekv.layout import KVLayout
from cakekv.rotation import Rotation

_DTYPES = ("bfloat16", "float16", "float32")
_LENGTH = np.dtype("<u4")


class ChunkCoder:
    """A codec at work on the chunks of one model.

    A chunk is stored in one of three forms. The *exact* form is the cache's own bytes; the newest tokens of a prompt
    have it, and chunks that the codec cannot make smaller. The *packed* form is the exact one in fewer bytes; stores
    make it, and whoever reads it takes it for the exact one. The *coded* form is always smaller than the exact one, so
    that a stored chunk's size tells its form. Its segments are the codes of the layers' planes, one behind the other;
    first the first part of every layer, then the second of every layer. Where codes vary in length, a segment begins
    with the lengths of all of its codes but the last.

    Parameters
    ----------
    codec : Codec
        Encodes and decodes planes.
    layout : KVLayout
        The model's.
    tokens : int
        Tokens per chunk.
    dtype : str
        The model's cache's, as in `Identity`.
    rotations : callable or None
        How each layer's keys are turned by their positions; called only if the codec wants to know. Raises
        `UnknownRotation`, with the reason, if that is not known.

    Raises
    ------
    BadInput
        The codec is lossy, and does not know the element type; or it takes keys back to before RoPE, and how they are
        turned is not known.
    """

    def __init__(
        self,
        codec: Codec,
        layout: KVLayout,
        tokens: int,
        dtype: str,
        rotations: Callable[[], Sequence[Rotation]] | None = None,
    ) -> None:
        self.codec = codec
        self.exact = ChunkShape(tokens, layout.segment_bytes(tokens))
        """The exact form."""
        self.layers = len(layout.layers)
        self.encodes = codec.encodes
        if self.encodes and dtype not in _DTYPES:
            raise BadInput(f"codec {codec.name} is for caches in {', '.join(_DTYPES)}, and this model's is {dtype}")
        self._planes = [
            [
                Plane(
                    "values" if index else "keys",
                    layer,
                    self.layers,
                    plane.heads,
                    tokens,
                    plane.width,
                    dtype,
                    windowed=kept.window is not None,
                )
                for index, plane in enumerate(kept.planes)
            ]
            for layer, kept in enumerate(layout.layers)
        ]
        for planes in self._planes:
            for plane in planes:
                codec.check_plane(plane)
        if codec.turns_back:
            known = _known(codec, rotations)
            self._planes = [
                [replace(planes[0], rotation=rotation), *planes[1:]]
                for planes, rotation in zip(self._planes, known, strict=True)
            ]

    @cached_property
    def _sizes(self) -> list[list[list[int]]]:
        """Bytes of codes, at most: by part, layer and plane."""
        return [
            [[self.codec.size(plane, part) for plane in planes] for planes in self._planes]
            for part in range(self.codec.parts)
        ]

    @cached_property
    def longest(self) -> ChunkShape:
        """The coded form at its longest; if the codec is fixed, as it always is."""
        lengths = [
            sum(sizes) + self._lengths_bytes(planes)
            for part in self._sizes
            for planes, sizes in zip(self._planes, part, strict=True)
        ]
        return ChunkShape(self.exact.tokens, tuple(lengths), Form.CODED)

    @cached_property
    def _shrinks(self) -> bool:
        return self.encodes and not (self.codec.fixed and self.longest.total_bytes >= self.exact.total_bytes)

    @property
    def decodes_on_device(self) -> bool:
        """Whether there are coded chunks, and `DeviceDecoder` can decode them."""
        return self._shrinks and self.codec.on_device

    def planes_of(self, layer: int) -> Sequence[Plane]:
        """What a layer's segment holds, in its order."""
        return self._planes[layer]

    def sizes_of(self, layer: int, part: int = 0) -> Sequence[int]:
        """Bytes of the codes in a segment, plane by plane: exactly if the codec is fixed, else at most."""
        return self._sizes[part][layer]

    def shape_of(self, size: int) -> ChunkShape | None:
        """The shape of a stored chunk of `size` bytes; None if only its header tells."""
        if is_packed(size):
            return None
        if not self._shrinks or size == self.exact.total_bytes:
            return self.exact
        return self.longest if self.codec.fixed else None

    def header_bytes(self, size: int) -> int:
        """Length of the header of a stored chunk of `size` bytes."""
        if is_packed(size):
            return header_bytes(self.layers, Form.PACKED)
        return (self.shape_of(size) or self.longest).header_bytes

    def wants_all(self, size: int, layers: Sequence[int], parts: int | None) -> bool:
        """Whether these layers, and so many parts of them (None: as many as the codec reads), are a whole chunk."""
        every_part = is_packed(size) or (parts or self.codec.parts_read) == self.codec.parts
        return len(layers) == self.layers and every_part

    def is_exact(self, size: int) -> bool:
        """Whether a stored chunk of `size` bytes has the cache's own bits: it is in the exact form, or packed."""
        return not self._shrinks or size == self.exact.total_bytes or is_packed(size)

    def expected(self, sizes: Sequence[int]) -> ChunkShape:
        """About the shape of the stored chunks of these sizes, to plan with."""
        if self._shrinks and self.codec.fixed:
            return self.longest
        if not self._shrinks or not sizes:
            return self.exact
        body = sum(sizes) / len(sizes) - self.longest.header_bytes
        share = min(1.0, max(body, 1.0) / sum(self.exact.segment_bytes))
        lengths = (max(1, int(n * share * part)) for part in self.codec.shares for n in self.exact.segment_bytes)
        return ChunkShape(self.exact.tokens, tuple(lengths), Form.CODED)

    def share_read(self, sizes: Sequence[int]) -> float:
        """How many bytes of the stored chunks of these sizes there are to each byte of `expected`: fewer if packed."""
        if self.encodes or not sizes:
            return 1.0
        return sum(sizes) / len(sizes) / self.exact.total_bytes

    def check(self, header: ChunkHeader, key: ChunkKey, position: int) -> None:
        """Raise `CorruptChunk` unless a chunk is this one, in whichever form."""
        shape = self.exact
        if header.shape.form is Form.PACKED:
            fits = header.shape.exact == self.exact and header.total_bytes < self.exact.total_bytes
            shape = header.shape if fits else shape
        elif header.shape.form is Form.CODED and self._shrinks:
            shape = self._coded(header)
        header.expect(shape, key, position)

    def _coded(self, header: ChunkHeader) -> ChunkShape:
        """The shape that a coded chunk should have, as far as that is not for its header to say."""
        longest = self.longest
        if self.codec.fixed or header.tokens != longest.tokens or len(header.lengths) != len(longest.segment_bytes):
            return longest
        fits = all(length <= most for length, most in zip(header.lengths, longest.segment_bytes, strict=True))
        return header.shape if fits and header.total_bytes < self.exact.total_bytes else longest

    def segments_of(self, shape: ChunkShape, layers: Sequence[int], parts: int | None = None) -> Sequence[int]:
        """The segments of a chunk that hold these layers, so many parts of them; None: as many as the codec reads."""
        if shape.form is not Form.CODED:
            return layers
        return [part * self.layers + layer for part in range(parts or self.codec.parts_read) for layer in layers]

    def encode(self, exact: memoryview, coded: memoryview, key: ChunkKey, position: int) -> memoryview | None:
        """Make the coded form of a chunk.

        Parameters
        ----------
        exact : memoryview
            Holds the segments of the exact form, at its offsets.
        coded : memoryview
            At least as long as the exact form.
        key, position
            As for `seal`.

        Returns
        -------
        memoryview or None
            The sealed chunk, the beginning of `coded`; None if it would not be smaller.

        Raises
        ------
        CannotEncode
            An element is not finite, or beyond all reason; or for the codec's own reason.
        """
        from cakekv.codec.elements import from_elements

        codec = self.codec
        if not self._shrinks:
            return None
        sources = segments(self.exact, exact)
        decoded: list[list[Values]] = []
        placed = [self._at(planes, position) for planes in self._planes]
        for planes, source in zip(placed, sources, strict=True):
            offset = 0
            decoded.append([])
            for plane in planes:
                data = np.frombuffer(source, np.uint8, plane.raw_bytes, offset)
                values = from_elements(data, plane.dtype, plane.shape)
                if not np.abs(values).max(initial=0.0) <= LARGEST:
                    raise CannotEncode(
                        f"the {plane.role} of layer {plane.layer}, tokens from {position}, are not all finite, "
                        "or too large; the chunk is not saved"
                    )
                decoded[-1].append(values)
                offset += plane.raw_bytes
        prepared = codec.prepare(placed, decoded, position)
        lengths: list[int] = []
        begin = self.longest.header_bytes
        for part in range(codec.parts):
            every = chain.from_iterable(prepared)
            for planes in placed:
                end = begin + self._lengths_bytes(planes)
                used = []
                for plane in planes:
                    size = codec.size(plane, part)
                    if end + size > len(coded):
                        return None
                    used.append(codec.encode(plane, next(every), np.frombuffer(coded, np.uint8, size, end), part))
                    end += used[-1]
                if not codec.fixed:
                    coded[begin : begin + self._lengths_bytes(planes)] = np.array(used[:-1], _LENGTH).tobytes()
                lengths.append(end - begin)
                begin = -(-end // TIGHT) * TIGHT
        shape = ChunkShape(self.exact.tokens, tuple(lengths), Form.CODED)
        if shape.total_bytes >= self.exact.total_bytes:
            return None
        seal(shape, coded, key, position)
        return coded[: shape.total_bytes]

    def decode(self, layer: int, codes: Sequence[memoryview], exact: memoryview, position: int) -> None:
        """Decode a layer.

        Parameters
        ----------
        layer : int
            Which one.
        codes : sequence of memoryview
            The parts of its code that were read, verified; at least one.
        exact : memoryview
            Is filled with the layer's segment of the exact form.
        position : int
            Of the chunk's first token.

        Raises
        ------
        CorruptChunk
            A code is not what the codec writes.
        """
        from cakekv.codec.elements import to_elements

        planes = self._at(self._planes[layer], position)
        try:
            split = [self._split(part, layer, code) for part, code in enumerate(codes)]
            offset = 0
            for index, plane in enumerate(planes):
                values = np.empty(plane.shape, np.float32)
                self.codec.decode(plane, [parts[index] for parts in split], values)
                to_elements(values, plane.dtype, np.frombuffer(exact, np.uint8, plane.raw_bytes, offset))
                offset += plane.raw_bytes
        except DamagedCode as damage:
            raise CorruptChunk(ChunkFault.UNDECODABLE, f"layer {layer}: {damage}") from damage

    def warm_up(self) -> None:
        """Have everything compiled before anybody waits for it."""
        if not self._shrinks:
            return
        exact, coded = memoryview(bytearray(self.exact.total_bytes)), memoryview(bytearray(self.exact.total_bytes))
        chunk = None
        with suppress(CannotEncode):  # a chunk of nothing but zeros, for the codec's own reason
            chunk = self.encode(exact, coded, ChunkKey(bytes(ChunkKey.LENGTH)), 0)
        if chunk is not None:
            shape = read_header(chunk, len(chunk)).shape
            views = segments(shape, chunk)
            self.decode(0, [views[index] for index in self.segments_of(shape, [0])], segments(self.exact, exact)[0], 0)

    def _at(self, planes: list[Plane], position: int) -> list[Plane]:
        """Planes whose first token is at `position`, for a codec that wants to know."""
        return [replace(plane, start=position) for plane in planes] if self.codec.turns_back else planes

    def _lengths_bytes(self, planes: list[Plane]) -> int:
        return 0 if self.codec.fixed else _LENGTH.itemsize * (len(planes) - 1)

    def _split(self, part: int, layer: int, code: memoryview) -> list[Code]:
        """A segment's bytes, plane by plane."""
        data = cast(Code, np.frombuffer(code, np.uint8))
        lengths = most = self._sizes[part][layer]
        begin = 0
        if not self.codec.fixed:
            begin = self._lengths_bytes(self._planes[layer])
            if len(data) < begin:
                raise DamagedCode("it ends within its lengths")
            lengths = [int(length) for length in data[:begin].view(_LENGTH)]
            lengths.append(len(data) - begin - sum(lengths))
            if not all(0 <= length <= limit for length, limit in zip(lengths, most, strict=True)):
                raise DamagedCode(f"its lengths are {lengths}")
        if begin + sum(lengths) != len(data):
            raise DamagedCode(f"it has {len(data)} bytes instead of {begin + sum(lengths)}")
        ends = list(accumulate(lengths, initial=begin))
        return [data[begin:end] for begin, end in pairwise(ends)]


def _known(codec: Codec, rotations: Callable[[], Sequence[Rotation]] | None) -> Sequence[Rotation]:
    """How a model turns its keys, for a codec that has to know; raises `BadInput` if that is not known."""
    try:
        if rotations is None:
            raise UnknownRotation("this engine does not tell")
        return rotations()
    except UnknownRotation as error:
        advice = f"{codec.name}:rope=after" if hasattr(codec, "rope") else "another codec"
        raise BadInput(
            f"codec {codec.name} takes keys back to before RoPE, and how this model turns them is not known: {error}. "
            f"Take {advice}"
        ) from error
