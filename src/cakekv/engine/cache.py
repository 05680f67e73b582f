"""A KV cache in which every position has its place from the start, so that it can be filled from both ends."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cakekv.embedded.executor import check
from cakekv.engine.versions import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
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


class Writes:
    """What was written to a cache by forwards, as far as it concerns those who still want to copy out of it.

    Attributes
    ----------
    watched : int
        End of the positions that somebody wants to copy.
    early : list of int
        Where the writes began that began before that.
    counted : int
        As many writes as the forwards made: torch, which counts all, finds more if somebody else wrote, too.
    turns : int
        Odd while the engine runs a forward, after which alone `counted` is right: a compiled one counts at its end.
    """

    def __init__(self) -> None:
        self.watched = 0
        self.early: list[int] = []
        self.counted = 0
        self.turns = 0

    def begin(self, position: int) -> None:
        """Note that a layer's keys and values are about to be written from `position` on."""
        self.counted += 2
        if position < self.watched:
            self.early.append(position)


class TwoEndedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, for one sequence.

    Parameters
    ----------
    shape : LayerShape
        What it keeps.
    regions : list of Tensor
        Its memory: see the attribute.
    writes : Writes
        The cache's.

    Attributes
    ----------
    length : int
        The next forward writes at this position and may read every position below it that its window shows.
    keys, values : Tensor
        What the next token will see, (1, heads, tokens, width): a view.
    regions : list of Tensor
        The layer's memory, each (heads, capacity, width). One after the other, the bytes of [:, start:end] are a
        segment, as `KVLayout.segment_bytes` lays it out. Keys and values of one shape share a region, so that a
        segment is placed with a single copy.
    kept_from : int
        Every position from here to `length` is there. With a window, those before it may never have been loaded.
    token_bytes : int
        Bytes of one token.
    key_heads : int
        How many heads of the first region are keys.
    before_read : callable
        Called before a span reads the layer; returns once what it may see is there.
    absent : Tensor or None
        (kv_heads, capacity), bool: the rows that are not there although their position is covered. They are zeros. None
        if there cannot be any.
    has_absent : bool
        Whether there may be any.
    hides : bool
        Whether whoever reads the layer hides them.
    """

    is_croppable = True

    def __init__(
        self,
        shape: LayerShape,
        regions: list[torch.Tensor],
        writes: Writes | None = None,
        absent: torch.Tensor | None = None,
    ) -> None:
        # Not the base class's, which sets keys and values.
        self._writes = writes or Writes()
        self.window = shape.window
        self.regions = regions
        self.capacity = regions[0].shape[1]
        self.length = 0
        self.kept_from = 0
        self.before_read: Callable[[], None] = _go_on
        self.is_sliding = self.window is not None
        self.is_initialized = True
        heads = shape.keys.heads
        keys, values = regions if len(regions) == 2 else (regions[0][:heads], regions[0][heads:])
        self._keys, self._values = keys[None], values[None]
        self.key_heads = heads
        self.absent = absent
        self.has_absent = self.hides = False
        self.token_bytes = shape.layout.token_bytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a span's keys and values behind what is covered, and return all that the span may see.

        Raises
        ------
        BadInput
            They do not fit, are of several sequences, or belong to a graph of gradients. Nothing was written.
        """
        self.before_read()
        first, end = self._first_visible(), self.length + key_states.shape[-2]
        if key_states.shape[0] != 1:
            raise BadInput(f"this cache holds one sequence, not {key_states.shape[0]}: {_INSTEAD}")
        if end > self.capacity:
            raise BadInput(
                f"this cache has room for {self.capacity} tokens: {end - self.length} more do not fit behind the "
                f"{self.length} that it holds. Ask for room with Cake.prefill(prompt, room=N), or {_INSTEAD}"
            )
        if key_states.requires_grad:
            raise BadInput("this cache keeps no gradients: call the model under torch.no_grad()")
        if self.has_absent:
            if not self.hides:
                raise BadInput(f"rows of this cache are absent, to which a model would attend: {_NOT_STORED}")
            self.known_absent[:, self.length : end] = False
        self._writes.begin(self.length)
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        return self._keys[:, :, first:end], self._values[:, :, first:end]

    def overwrite(
        self, key_states: torch.Tensor, value_states: torch.Tensor, positions: torch.Tensor, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values over those at `positions`, and return all that the span from `start` to `end` may see.

        As many positions as there are keys; ascending, of the span, which is covered from then on.
        """
        self._writes.begin(start)
        self._keys[:, :, positions] = key_states.to(self._keys.dtype)  # which slices do by themselves
        self._values[:, :, positions] = value_states.to(self._values.dtype)
        self.length = end
        first = self._first_visible(start)
        return self._keys[:, :, first:end], self._values[:, :, first:end]

    def write_back(self, positions: Any, regions: list[torch.Tensor]) -> None:
        """Write what was at these positions of the layer's memory before."""
        for region, before in zip(self.regions, regions, strict=True):
            self._writes.counted += 1
            region[:, positions] = before

    def find_absent(self, start: int, tokens: int) -> None:
        """Find the rows of a chunk that was placed that are absent: their keys are NaN. Zeros take their place."""
        keys = self._keys[0, :, start : start + tokens]
        absent = keys[..., 0].isnan()
        if bool(absent.any()):
            if keys.device.type == "cpu":  # by NumPy: what torch writes there it counts, as `Writes` says
                plain = keys.view(torch.int16 if keys.itemsize == 2 else torch.int32)
                plain.numpy()[absent.numpy()] = 0
            else:
                keys.masked_fill_(absent[..., None], 0.0)
            self.known_absent[:, start : start + tokens] = absent
            self.has_absent = True
        elif self.has_absent:
            self.known_absent[:, start : start + tokens] = False

    @property
    def known_absent(self) -> torch.Tensor:
        """`absent`, where there may be any."""
        assert self.absent is not None
        return self.absent

    def plane(self, number: int) -> torch.Tensor:
        """All memory for keys (0) or values (1), (1, heads, capacity, width)."""
        return (self._keys, self._values)[number]

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

    @property
    def keys(self) -> torch.Tensor:
        return self._keys[:, :, self._first_visible() : self.length]

    @property
    def values(self) -> torch.Tensor:
        return self._values[:, :, self._first_visible() : self.length]

    def reset(self) -> None:
        """Forget what is covered."""
        self.length = self.kept_from = 0

    def go_to(self, length: int) -> None:
        """Go on at `length`; all that is visible from there is covered."""
        first = self._first_visible(length)
        self.kept_from = first if length > self.length else min(first, self.kept_from)
        self.length = length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Parameters
        ----------
        tokens_to_remove : int
            How many, as a negative number or 0: as for transformers' own layers.

        Raises
        ------
        BadInput
            There are not so many, or what would be visible then was never loaded.
        """
        length = self.length + tokens_to_remove
        if tokens_to_remove > 0 or length < 0:
            raise BadInput(f"crop({tokens_to_remove}) of {self.length} tokens: give minus how many to remove")
        self.check_kept(length)
        self.length = length

    def check_kept(self, length: int) -> None:
        """Refuse to go on at `length` if what is visible from there may not be there.

        Raises
        ------
        BadInput
            It may not.
        """
        if not length <= self.length or self._first_visible(length) < self.kept_from:
            raise BadInput(
                f"a cache of {self.length} tokens cannot be cut to {length}: of layers with a window of {self.window} "
                f"only the positions from {self.kept_from} on are there. Use Cake.prefill(token_ids[:{length}])"
            )

    def dynamic(self, length: int) -> DynamicLayer:
        """A copy of the first `length` tokens, as transformers' own layer for them."""
        first = self._first_visible(length)
        keys, values = (plane[:, :, first:length].clone() for plane in (self._keys, self._values))
        layer = DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(self.window)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if self.window is not None:
            layer.cumulative_length = length
        return layer

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, like `batch_select_indices` and `reorder_cache`: there is one sequence."""
        raise BadInput(f"this cache holds one sequence: {_INSTEAD}")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `batch_repeat_interleave`."""
        raise BadInput(f"this cache holds one sequence: {_INSTEAD}")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As `batch_repeat_interleave`."""
        raise BadInput(f"this cache holds one sequence: {_INSTEAD}")

    def _first_visible(self, length: int | None = None) -> int:
        """The lowest position that a query at `length` (at the layer's, if not given) sees."""
        length = self.length if length is None else length
        return 0 if self.window is None else max(0, length - self.window + 1)


_NOT_STORED = "they were not stored. Have Cake.generate answer, or give no compress that acts at store"


class SharingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Stands for a layer that keeps nothing, and attends to what an earlier layer keeps, as KVSharer has it.

    Parameters
    ----------
    source : CacheLayerMixin
        The earlier layer's, without a window.
    """

    is_croppable = True
    is_initialized = True
    is_sliding = False

    def __init__(self, source: Any) -> None:
        self.source = source

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the source keeps, the same span's included: it came before. What this layer computed is not kept."""
        return self.source.keys, self.source.values

    @property
    def keys(self) -> torch.Tensor:
        return self.source.keys  # type: ignore[no-any-return]

    @property
    def values(self) -> torch.Tensor:
        return self.source.values  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the source's."""
        return self.source.get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        """As the source's."""
        return self.source.get_seq_length()  # type: ignore[no-any-return]

    def get_max_length(self) -> int:
        """As the source's."""
        return self.source.get_max_length()  # type: ignore[no-any-return]

    def _nothing(self, *_: Any, **__: Any) -> None:
        """The source does what there is to do."""

    reset = crop = batch_repeat_interleave = batch_select_indices = reorder_cache = _nothing


_INSTEAD = "give transformers' generate() what Prefill.dynamic_cache() returns"


def _go_on() -> None:
    """Nothing to wait for. Layer by layer, a span ends soon if nobody wants it any more."""
    check()


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


class _Restored(Cache):  # type: ignore[misc]
    """Refuses what transformers' assisted decoding does with a cache that is not empty.

    Its first forward gets all the tokens that it was given, and those that the cache has would come twice.
    """

    _assists = False

    def activate_past_recording(self) -> None:
        """Assisted decoding begins."""
        super().activate_past_recording()
        self._assists = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's. Raises `BadInput` if these may be all tokens once more."""
        covered = self.layers[layer_idx].get_seq_length()
        if self._assists and 0 < covered < key_states.shape[-2]:
            raise BadInput(
                f"assisted decoding computes all tokens that it is given, but the cache has {covered} of them: give it "
                f"the others, input_ids[:, {covered}:], and attention_mask=torch.ones_like(input_ids) for all"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]


class RestoredCache(_Restored, DynamicCache):  # type: ignore[misc]
    """What `Prefill.dynamic_cache` returns: transformers' own cache, for as many sequences as go on from its prefix.

    They may be beams, or a batch of prompts that begin alike.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's."""
        layer, sequences = self.layers[layer_idx], key_states.shape[0]
        if layer.keys.shape[0] == 1 < sequences:
            layer.batch_repeat_interleave(sequences)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class TwoEndedCache(_Restored):
    """The layers of a model, for one sequence, to be passed to its forward as its cache.

    Parameters
    ----------
    shapes : sequence of LayerShape or None
        One per layer of the model; None for a layer that keeps nothing (it reads another layer's, or has no attention).
    capacity : int
        Tokens to make room for.
    device : torch.device
        Where the model computes.
    sparse : bool
        Whether rows may be absent from chunks that are placed.
    sources : mapping of int to int
        Of layers that keep nothing and attend to what another keeps: which one's.

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

    def __init__(
        self,
        shapes: Sequence[LayerShape | None],
        capacity: int,
        device: torch.device,
        sparse: bool = False,
        sources: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.capacity = capacity
        self.sparse = sparse
        self.stored: list[TwoEndedLayer] = []
        self.stacks: list[Stack] = []
        self._writes = Writes()
        self._joint: list[torch.Tensor] = []
        kept = [shape for shape in shapes if shape is not None]
        for _, alike in groupby(kept, key=lambda shape: shape[:2]):
            self._add(list(alike), device)
        stored = iter(self.stored)
        layers = [DummyLayer() if shape is None else next(stored) for shape in shapes]
        for layer, source in sources.items():
            layers[layer] = SharingLayer(layers[source])
        super().__init__(layers=layers)

    def _add(self, shapes: Sequence[LayerShape], device: torch.device) -> None:
        """Add layers that differ in their windows at most."""
        keys, values, _ = shapes[0]
        planes = [keys._replace(heads=keys.heads + values.heads)] if keys[1:] == values[1:] else [keys, values]
        sizes = [(heads, self.capacity, width) for heads, width, _ in planes]
        memory: list[Sequence[torch.Tensor]]
        if device.type == "cpu":
            joint = [_host_memory((len(shapes), *size), plane.dtype) for size, plane in zip(sizes, planes, strict=True)]
            self._joint += joint
            self.stacks.append(Stack(len(self.stored), [region.view(torch.uint8).numpy() for region in joint]))
            memory = [region.unbind() for region in joint]
        else:
            try:
                memory = [
                    [torch.empty(size, dtype=plane.dtype, device=device) for _ in shapes]
                    for size, plane in zip(sizes, planes, strict=True)
                ]
            except RuntimeError as error:  # torch's OutOfMemoryError is one
                raise _no_memory(len(shapes) * self.capacity * shapes[0].layout.token_bytes) from error
        for shape, *regions in zip(shapes, *memory, strict=True):
            size = shape.keys.heads, self.capacity
            absent = torch.zeros(size, dtype=torch.bool, device=device) if self.sparse else None
            self.stored.append(TwoEndedLayer(shape, list(regions), self._writes, absent))

    @property
    def length(self) -> int:
        """Where the next forward begins in the layer that is furthest behind."""
        return min(layer.length for layer in self.stored)

    @property
    def has_absent(self) -> bool:
        """Whether rows may be absent: to run a forward, see `TransformersEngine.attending`."""
        return any(layer.has_absent for layer in self.stored)

    def find_absent(self, start: int, tokens: int, segments: Sequence[Any]) -> None:
        """Find the rows that are absent from a chunk of which these segments, but for None, were placed."""
        if self.sparse:
            with torch.inference_mode():
                for layer, segment in zip(self.stored, segments, strict=True):
                    if segment is not None:
                        layer.find_absent(start, tokens)

    def forget_absent(self) -> None:
        """All rows are there again."""
        for layer in self.stored:
            if layer.has_absent:
                layer.known_absent.zero_()
                layer.has_absent = False

    def present_share(self, length: int) -> float:
        """Of the rows of all layers and heads up to `length`, the part that is there."""
        missing = sum(int(layer.absent[:, :length].sum()) for layer in self.stored if layer.absent is not None)
        return 1 - missing / (length * sum(layer.key_heads for layer in self.stored))

    def set_length(self, length: int) -> None:
        """Say that the next forward begins at `length` and that all it can see below is covered."""
        for layer in self.stored:
            layer.go_to(length)

    def dynamic_cache(self, length: int) -> RestoredCache:
        """A copy of the first `length` tokens as transformers' own cache, which grows, and holds beams and batches.

        Raises
        ------
        BadInput
            The cache does not hold so many, or layers with a window do not have what would be visible from there; or
            rows are absent.
        """
        self.check_present(0, length)
        for layer in self.stored:
            layer.check_kept(length)
        cache = RestoredCache()
        cache.layers = [layer.dynamic(length) if isinstance(layer, TwoEndedLayer) else layer for layer in self.layers]
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, SharingLayer):
                cache.layers[number] = SharingLayer(cache.layers[self.layers.index(layer.source)])
        return cache

    def check_present(self, start: int, end: int) -> None:
        """Raise `BadInput` if rows from `start` to `end` are absent."""
        if any(layer.has_absent and bool(layer.known_absent[:, start:end].any()) for layer in self.stored):
            raise BadInput(f"between positions {start} and {end}, rows are absent: {_NOT_STORED}")

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """Within the `with` block, whoever reads its layers hides rows that are absent."""
        self._hide(True)
        try:
            yield
        finally:
            self._hide(False)

    def _hide(self, hides: bool) -> None:
        if self.sparse:
            for layer in self.stored:
                layer.hides = hides

    def watch_below(self, end: int) -> tuple[int, int]:
        """Begin to watch the positions below `end`, which are covered; what it returns is for `rewritten`."""
        self._writes.watched = max(self._writes.watched, end)
        return len(self._writes.early), self._others_writes()

    def rewritten(self, end: int, since: tuple[int, int]) -> bool:
        """Whether a forward has written below `end` since they were watched, or, in the host's memory, somebody else
        has written anywhere.
        """
        writes, (early, others) = self._writes, since
        turns = writes.turns
        written = self._others_writes() > others and turns == writes.turns and turns % 2 == 0
        return written or min(writes.early[early:], default=end) < end

    def _others_writes(self) -> int:
        made = sum(region._version for region in self._joint if not region.is_inference())
        return made - self._writes.counted

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """The engine runs a forward within the `with` block."""
        self._writes.turns += 1
        try:
            yield
        finally:
            self._writes.turns += 1

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


def numbers_of(layers: Sequence[Any], kind: type[Any]) -> dict[int, int]:
    """By the model's number of each layer of this kind: its number among those, ascending."""
    return {at: number for number, at in enumerate(at for at, layer in enumerate(layers) if isinstance(layer, kind))}


def _host_memory(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in huge pages where the system has them: what is copied into new memory waits mostly for its pages."""
    length = math.prod(size) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise _no_memory(length) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(size)).view(size)


def _no_memory(length: int) -> BadInput:
    return BadInput(
        f"there is no memory for a KV cache of {format_bytes(length)}: shorten the prompt, or ask for fewer new tokens"
    )
