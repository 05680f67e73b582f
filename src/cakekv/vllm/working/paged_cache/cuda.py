"""A paged cache on a CUDA device: copies on streams beside the one that computes, from and to pinned memory.

The order of things, by streams:

- A load is placed behind whatever was launched before the step that ordered it: that may still use the blocks for those
  who had them before. `place` returns when its copies are done, so a chunk is reported only then, and giving a load up,
  which waits for a `place` that has begun, holds the next step back until nothing is written any more.
- A save is copied behind the step that completes its blocks, and waited for by the thread that writes it. Should a
  later step be given one of the blocks before, that step's computing waits for the copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from cakekv.codec.base import Segment
from cakekv.vllm.working.paged_cache.base import PagedCache

if TYPE_CHECKING:
    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder
    from cakekv.vllm.messages import StepOrders
    from cakekv.vllm.working.paged_cache.order import BlockOrder


class _Copy(NamedTuple):
    """A save that may not be through."""

    block_ids: Collection[int]
    done: torch.cuda.Event


class CudaPagedCache(PagedCache):
    """Copies between pinned and device memory in one piece per layer, and between pieces and blocks on the device.

    Parameters
    ----------
    layers : sequence of tensor
        As `PagedCache`'s.
    zeroed : bool
        Whether vLLM zeroes blocks before it uses them again. It does so before `begin_step`; so then the computing
        stream waits for every save.
    """

    def __init__(self, layers: Sequence[torch.Tensor], zeroed: bool = False) -> None:
        super().__init__(layers)
        self._layers = [_in_words(layer) for layer in layers]
        self._zeroed = zeroed
        self._device = layers[0].device
        self._placing = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._gathering = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.copies: deque[_Copy] = deque()
        """The earliest first."""
        self._before_loads = self._mark(self._computing())

    def machine(self) -> str:
        return "rocm" if torch.version.hip else "cuda"

    def allocate(self, size: int) -> memoryview:
        with torch.cuda.device(self._device):  # a thread's device is the first one until it is set
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data

    def decoder(self, coder: ChunkCoder, orders: Sequence[BlockOrder]) -> DeviceDecoder | None:
        if not coder.decodes_on_device:
            return None
        from cakekv.codec.on_device import DeviceDecoder  # which needs numba, as codecs do
        from cakekv.vllm.working.paged_cache.device_order import DeviceOrder

        known = {order: DeviceOrder(order, self._device) for order in orders}
        by_layer = [known[order] for order in orders]
        decoder = DeviceDecoder(
            coder, self._device, self._decoding, lambda layer, planes: by_layer[layer].to_blocks(planes)
        )
        decoder.warm_up()
        return decoder

    def begin_step(self, orders: StepOrders) -> None:
        while self.copies and self.copies[0].done.query():  # type: ignore[no-untyped-call]
            self.copies.popleft()
        if self.copies:
            taken = {block for order in orders.loads for block in order.block_ids}.union(orders.new_blocks)
            for copy in self.copies:
                if not taken.isdisjoint(copy.block_ids):
                    self._computing().wait_event(copy.done)
        if orders.loads:
            self._before_loads = self._mark(self._computing())

    def gather(self, block_ids: Sequence[int], segments: Sequence[memoryview]) -> Callable[[], None]:
        computing = self._computing()
        computed = self._mark(computing)
        with self._on(self._gathering):
            self._gathering.wait_event(computed)
            index = self._index(block_ids)
            for layer, segment in zip(self._layers, segments, strict=True):
                _tensor(layer, segment).copy_(layer.index_select(0, index), non_blocking=True)
        done = self._mark(self._gathering)
        self.copies.append(_Copy(block_ids, done))
        if self._zeroed:
            computing.wait_event(done)
        return done.synchronize

    def place(self, block_ids: Sequence[int], segments: Sequence[Segment | None]) -> None:
        with self._on(self._placing):
            self._placing.wait_event(self._before_loads)
            index = self._index(block_ids)
            for layer, segment in zip(self._layers, segments, strict=True):
                if segment is not None:
                    layer.index_copy_(0, index, _tensor(layer, segment).to(self._device, non_blocking=True))
            done = self._mark(self._placing)
        done.synchronize()

    def _computing(self) -> torch.cuda.Stream:
        """The stream of the thread that launches steps; only to be asked for in that thread."""
        return torch.cuda.current_stream(self._device)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        # Inference mode is per thread; a cache that was made in it cannot be written outside of it.
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Work on the stream that loads are placed on, so that its memory is not used anew before it is placed."""
        with self._on(self._placing):
            try:
                yield
            finally:
                self._mark(self._placing).synchronize()

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """An event behind all that was launched on a stream so far; a thread that waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        # Not by `torch.tensor(…, device=…)`, which would wait for the stream.
        return torch.tensor(block_ids, pin_memory=True).to(self._device, non_blocking=True)


def _in_words(layer: torch.Tensor) -> torch.Tensor:
    """The same memory in the largest elements that it can be divided into: fewer for kernels to copy."""
    for word in (torch.int64, torch.int32, torch.int16):
        sizes = (*layer.stride()[:-1], layer.shape[-1], layer.storage_offset())
        if all(size % word.itemsize == 0 for size in sizes):
            return layer.view(word)
    return layer


def _tensor(layer: torch.Tensor, segment: Segment) -> torch.Tensor:
    """A segment as blocks of that layer."""
    in_words = (
        torch.frombuffer(segment, dtype=layer.dtype) if isinstance(segment, memoryview) else segment.view(layer.dtype)
    )
    return in_words.view(-1, *layer.shape[1:])
