"""A KV cache in which every position has its place from the start, so that it can be filled from both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from cakekv.layout import LayerLayout, PlaneLayout


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

    Attributes
    ----------
    length : int
        The next forward writes at this position and may read every position below it that its window shows.
    regions : list of Tensor
        The layer's memory, each (heads, capacity, width). One after the other, the bytes of [:, start:end] are a
        segment, as `KVLayout.segment_bytes` lays it out. Keys and values of one shape share a region, so that a
        segment is placed with a single copy.
    host_regions : list of NDArray
        The bytes of `regions`, (heads, capacity, width in bytes), if they are in the host's memory; else empty.
    token_bytes : int
        Bytes of one token.
    before_read : callable
        Called before a span reads the layer; returns once what it may see is there.
    """

    def __init__(self, shape: LayerShape, capacity: int, device: torch.device) -> None:
        super().__init__()
        keys, values, self.window = shape
        self.capacity = capacity
        self.length = 0
        self.before_read: Callable[[], None] = _go_on
        self.is_sliding = self.window is not None
        self.is_initialized = True
        if keys[1:] == values[1:]:
            joint = torch.empty((keys.heads + values.heads, capacity, keys.width), dtype=keys.dtype, device=device)
            self.regions = [joint]
            key_region, value_region = joint[: keys.heads], joint[keys.heads :]
        else:
            self.regions = [
                torch.empty((heads, capacity, width), dtype=dtype, device=device) for heads, width, dtype in shape[:2]
            ]
            key_region, value_region = self.regions
        self._keys, self._values = key_region[None], value_region[None]
        in_host = device.type == "cpu"
        self.host_regions = [region.view(torch.uint8).numpy() for region in self.regions] if in_host else []
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


class TwoEndedCache(Cache):  # type: ignore[misc]
    """The layers of a model, for one sequence, to be passed to its forward as `past_key_values`.

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
    """

    def __init__(self, shapes: Sequence[LayerShape | None], capacity: int, device: torch.device) -> None:
        layers = [DummyLayer() if shape is None else TwoEndedLayer(shape, capacity, device) for shape in shapes]
        super().__init__(layers=layers)
        self.capacity = capacity
        self.stored: list[TwoEndedLayer] = [layer for layer in layers if isinstance(layer, TwoEndedLayer)]

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
