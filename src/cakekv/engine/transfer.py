"""Moving a chunk's segments between a buffer of bytes and a cache: by the CPU, or by a GPU, which decodes, too."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from cakekv.codec.base import Segment
from cakekv.engine.base import Move
from cakekv.engine.cache import TwoEndedCache, TwoEndedLayer
from cakekv.engine.turning import place_moved
from cakekv.errors import BadInput, UnsupportedModel
from cakekv.rotation import Rotation

if TYPE_CHECKING:  # codecs need numba
    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder

AnySegment = TypeVar("AnySegment", bound=Segment)


class Transfer(ABC):
    """What `Engine.place`, `Engine.decoder`, `Engine.gather` and `Engine.staging` need of a device."""

    @abstractmethod
    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        """As `Engine.place`. When it returns, the segments may be overwritten."""

    def place_moved(
        self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None], move: Move
    ) -> int:
        """As `Engine.place` of a chunk that was computed elsewhere."""
        if move.skip < 0 or move.tokens - move.skip != tokens or start + tokens > cache.capacity:
            raise BadInput(
                f"{tokens} tokens of a chunk of {move.tokens}, less {move.skip}, do not fit at {start} into a cache "
                f"of {cache.capacity} tokens"
            )
        if len(segments) != len(cache.stored):
            raise BadInput(f"{len(segments)} segments for {len(cache.stored)} layers")
        rotations: Sequence[Rotation | None] = move.rotations or [None] * len(segments)
        placed = 0
        for layer, segment, rotation in zip(cache.stored, segments, rotations, strict=True):
            if segment is None:
                continue
            if segment.nbytes != layer.token_bytes * move.tokens:
                raise BadInput(f"a layer's segment has {segment.nbytes} bytes for {move.tokens} tokens")
            place_moved(layer, start, segment, move, rotation)
            placed += layer.token_bytes * tokens
        cache.find_absent(start, tokens, segments)
        return placed

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        """As `Engine.decoder`."""
        return None

    @abstractmethod
    def gather(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        """As `Engine.gather`."""

    @abstractmethod
    def staging(self, size: int) -> memoryview:
        """As `Engine.staging`."""


def transfer_for(device: torch.device) -> Transfer:
    """The way to move segments to and from caches on `device`."""
    if device.type == "cpu":
        return HostTransfer()
    if device.type == "cuda":
        return CudaTransfer(device)
    raise UnsupportedModel(f"a model on {device} is not supported, because caches can be on cpu or cuda only")


class HostTransfer(Transfer):
    """Copies by NumPy, which lets go of the interpreter lock and stays in the calling thread.

    `Tensor.copy_` would do neither: each loader thread would start a team of OpenMP threads of its own, which would
    compete with the forward for the cores. All layers are copied at once where they can be: whoever lets go of the lock
    waits for whoever takes it.
    """

    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        placed = 0
        for region, part in _host_pairs(cache, start, tokens, segments):
            np.copyto(region, part)
            placed += part.nbytes
        cache.find_absent(start, tokens, segments)
        return placed

    def gather(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        for region, part in _host_pairs(cache, start, tokens, segments):
            np.copyto(part, region)

    def staging(self, size: int) -> memoryview:
        return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


class CudaTransfer(Transfer):
    """Copies and decodes on a stream beside the one that computes, from and to pinned memory.

    Every method waits until its work is done, so that nothing has to be remembered between calls: the staging
    buffer is free again, and whatever is launched after `place` has returned sees the chunk. Only the calling
    loader thread waits. The stream is not ordered behind the computing one; see `TransformersEngine.new_cache` and
    `compute`, which return only once the device is done with the memory they hand over.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        placed = 0
        with self._beside():
            for layer, segment in _pairs(cache, start, tokens, segments):
                for target, source in _tensors(layer, start, tokens, segment):
                    target.copy_(source, non_blocking=True)
                placed += segment.nbytes
            cache.find_absent(start, tokens, segments)
        return placed

    def place_moved(
        self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None], move: Move
    ) -> int:
        with self._beside():
            return super().place_moved(cache, start, tokens, segments, move)

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        if not coder.decodes_on_device:
            return None
        from cakekv.codec.on_device import DeviceDecoder

        decoder = DeviceDecoder(coder, self._device, self._beside)
        decoder.warm_up()
        return decoder

    def gather(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        with self._beside():
            for layer, segment in _pairs(cache, start, tokens, segments):
                for source, target in _tensors(layer, start, tokens, segment):
                    target.copy_(source, non_blocking=True)

    def staging(self, size: int) -> memoryview:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Have work done on the stream. At the end wait, asleep, for what this thread has put there."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record(self._stream)
                done.synchronize()


def _pairs(
    cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[AnySegment | None]
) -> Iterator[tuple[TwoEndedLayer, AnySegment]]:
    """The layers to copy with their segments, once all of them are known to fit."""
    if start < 0 or tokens < 1 or start + tokens > cache.capacity:
        raise BadInput(f"a chunk of {tokens} tokens at {start} does not fit a cache of {cache.capacity} tokens")
    if len(segments) != len(cache.stored):
        raise BadInput(f"{len(segments)} segments for {len(cache.stored)} layers")
    pairs = [(layer, segment) for layer, segment in zip(cache.stored, segments, strict=True) if segment is not None]
    for layer, segment in pairs:
        if segment.nbytes != (expected := layer.token_bytes * tokens):
            raise BadInput(f"a layer's segment has {segment.nbytes} bytes instead of {expected} for {tokens} tokens")
    return iter(pairs)


def _host_pairs(
    cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Pieces of the cache's memory, (layers, heads, tokens, width in bytes), with the bytes of the segments."""
    for _, segment in _pairs(cache, start, tokens, segments):
        assert isinstance(segment, memoryview), "there is no decoder"
    for first, regions in cache.stacks:
        for index, rows in _neighbours(segments[first : first + len(regions[0])]):
            offset = 0
            for region in regions:
                piece = region[index : index + len(rows), :, start : start + tokens]
                end = offset + piece[0].nbytes
                yield piece, rows[:, offset:end].reshape(piece.shape)
                offset = end


def _neighbours(segments: Sequence[Any]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Segments that follow one another at equal distances: the first's index, and all as (segments, bytes)."""
    arrays = [None if segment is None else np.frombuffer(segment, np.uint8) for segment in segments]
    places = [0 if array is None else array.__array_interface__["data"][0] for array in arrays]
    present = [*(array is not None for array in arrays), False]
    first = 0
    while first < len(arrays):
        end, array = first + 1, arrays[first]
        if array is not None:
            step = places[end] - places[first] if present[end] else 0
            while present[end] and places[end] - places[end - 1] == step:
                end += 1
            yield first, as_strided(array, (end - first, len(array)), (step, 1))
        first = end


def _tensors(
    layer: TwoEndedLayer, start: int, tokens: int, segment: Segment
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each of the layer's regions at the chunk's positions, with the same piece of the segment."""
    offset = 0
    for region in layer.regions:
        part = region[:, start : start + tokens]
        if isinstance(segment, memoryview):
            piece = torch.frombuffer(segment, dtype=part.dtype, count=part.numel(), offset=offset)
        else:
            piece = segment[offset : offset + part.nbytes].view(part.dtype)
        yield part, piece.view(part.shape)
        offset += part.nbytes
