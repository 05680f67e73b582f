"""A KV cache in which every position has its place from the start, so that it can be filled from both ends."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cakekv.engine.versions import Cache, CacheLayerMixin, DummyLayer
from cakekv.errors import BadInput
from cakekv.layout import LayerLayout, PlaneLayout
from cakekv.quantities import format_bytes


class Plane(NamedTuple):
    """What a layer's keys, or its values, look like."""

    heads: int
    width: int
    dtype: torch.dtype


class LayerShape(NamedTuple):
    """What a layer of a model keeps."""

    keys: Plane
    values: Plane
    window: int | None
    """As in `LayerLayout`."""

    @property
    def layout(self) -> LayerLayout:
        """The same without torch's types."""
        planes = (PlaneLayout(heads, width, dtype.itemsize) for heads, width, dtype in (self.keys, self.values))
        return LayerLayout(tuple(planes), self.window)


class TwoEndedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, for one sequence.

    Parameters
    ----------
    shape : LayerShape
        What it keeps.
    regions : list of Tensor
        Its memory: see the attribute.

    Attributes
    ----------
    length : int
        The next forward writes at this position and may read every position below it that its window shows.
    regions : list of Tensor
        The layer's memory, each (heads, capacity, width). One after the other, the bytes of [:, start:end] are a
        segment, as `KVLayout.segment_bytes` lays it out. Keys and values of one shape share a region, so that a
        segment is placed with a single copy.
    token_bytes : int
        Bytes of one token.
    before_read : callable
        Called before a span reads the layer; returns once what it may see is there.
    """

    def __init__(self, shape: LayerShape, regions: list[torch.Tensor]) -> None:
        super().__init__()
        self.window = shape.window
        self.regions = regions
        self.capacity = regions[0].shape[1]
        self.length = 0
        self.before_read: Callable[[], None] = _go_on
        self.is_sliding = self.window is not None
        self.is_initialized = True
        heads = shape.keys.heads
        keys, values = regions if len(regions) == 2 else (regions[0][:heads], regions[0][heads:])
        self._keys, self._values = keys[None], values[None]
        self.token_bytes = shape.layout.token_bytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a span's keys and values behind what is covered, and return all that the span may see."""
        self.before_read()
        first, end = self._first_visible(), self.length + key_states.shape[-2]
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        return self._keys[:, :, first:end], self._values[:, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions `update` will return for a span of `query_length` tokens, and the first of them."""
        first = self._first_visible()
        return self.length + query_length - first, first

    def get_seq_length(self) -> int:
        """Position at which the next span begins."""
        return self.length

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.capacity

    def reset(self) -> None:
        """Forget what is covered."""
        self.length = 0

    def _first_visible(self) -> int:
        """The lowest position that a query at `length` sees."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)


def _go_on() -> None:
    """Nothing to wait for."""


class Stack(NamedTuple):
    """Neighbouring layers of one shape that lie in the host's memory at equal distances.

    Attributes
    ----------
    first : int
        Which of the cache's `stored` layers is the first of them.
    regions : list of NDArray
        The bytes of the layers' regions, each (layers, heads, capacity, width in bytes).
    """

    first: int
    regions: list[NDArray[np.uint8]]


class TwoEndedCache(Cache):  # type: ignore[misc]
    """The layers of a model, for one sequence, to be passed to its forward as its cache.

    Parameters
    ----------
    shapes : sequence of LayerShape or None
        One per layer of the model; None for a layer that keeps nothing (it reads another layer's, or has no attention).
    capacity : int
        Tokens to make room for.
    device : torch.device
        Where the model computes.

    Attributes
    ----------
    stored : list of TwoEndedLayer
        The layers that keep something: those a chunk has segments for.
    stacks : list of Stack
        All of `stored`, if they are in the host's memory; else empty.

    Raises
    ------
    BadInput
        The host has no memory for so many tokens.
    """

    def __init__(self, shapes: Sequence[LayerShape | None], capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.stored: list[TwoEndedLayer] = []
        self.stacks: list[Stack] = []
        kept = [shape for shape in shapes if shape is not None]
        for _, alike in groupby(kept, key=lambda shape: shape[:2]):
            self._add(list(alike), device)
        stored = iter(self.stored)
        super().__init__(layers=[DummyLayer() if shape is None else next(stored) for shape in shapes])

    def _add(self, shapes: Sequence[LayerShape], device: torch.device) -> None:
        """Add layers that differ in their windows at most."""
        keys, values, _ = shapes[0]
        planes = [keys._replace(heads=keys.heads + values.heads)] if keys[1:] == values[1:] else [keys, values]
        sizes = [(heads, self.capacity, width) for heads, width, _ in planes]
        memory: list[Sequence[torch.Tensor]]
        if device.type == "cpu":
            joint = [_host_memory((len(shapes), *size), plane.dtype) for size, plane in zip(sizes, planes, strict=True)]
            self.stacks.append(Stack(len(self.stored), [region.view(torch.uint8).numpy() for region in joint]))
            memory = [region.unbind() for region in joint]
        else:
            memory = [
                [torch.empty(size, dtype=plane.dtype, device=device) for _ in shapes]
                for size, plane in zip(sizes, planes, strict=True)
            ]
        self.stored += [TwoEndedLayer(shape, list(regions)) for shape, *regions in zip(shapes, *memory, strict=True)]

    def set_length(self, length: int) -> None:
        """Say that the next forward begins at `length` and that all it can see below is covered."""
        for layer in self.stored:
            layer.length = length

    @contextmanager
    def gated(self, gate: Callable[[int], None]) -> Iterator[None]:
        """Within the `with` block, layer l of `stored` is read only once `gate(l)` has returned."""
        for index, layer in enumerate(self.stored):
            layer.before_read = partial(gate, index)
        try:
            yield
        finally:
            for layer in self.stored:
                layer.before_read = _go_on


def _host_memory(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in huge pages where the system has them: what is copied into new memory waits mostly for its pages."""
    length = math.prod(size) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BadInput(f"there is no memory for a KV cache of {format_bytes(length)}: shorten the prompt") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(size)).view(size)
