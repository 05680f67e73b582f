"""Moving a chunk's segments between a buffer of bytes and a cache: by the CPU, or by a GPU, which decodes, too."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from cakekv.codec.base import Segment
from cakekv.engine.cache import TwoEndedCache, TwoEndedLayer
from cakekv.errors import BadInput, UnsupportedModel

if TYPE_CHECKING:  # codecs need numba
    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder

AnySegment = TypeVar("AnySegment", bound=Segment)


class Transfer(ABC):
    """What `Engine.place`, `Engine.decoder`, `Engine.gather` and `Engine.staging` need of a device."""

    @abstractmethod
    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        """As `Engine.place`. When it returns, the segments may be overwritten."""

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
    compete with the forward for the cores.
    """

    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        placed = 0
        for layer, segment in _pairs(cache, start, tokens, segments):
            assert isinstance(segment, memoryview), "there is no decoder"
            offset = 0
            for region in layer.host_regions:
                target = region[:, start : start + tokens]
                np.copyto(target, np.ndarray(target.shape, np.uint8, segment, offset))
                offset += target.nbytes
            placed += offset
        return placed

    def gather(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        for layer, segment in _pairs(cache, start, tokens, segments):
            offset = 0
            for region in layer.host_regions:
                source = region[:, start : start + tokens]
                np.copyto(np.ndarray(source.shape, np.uint8, segment, offset), source)
                offset += source.nbytes

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
        return placed

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
