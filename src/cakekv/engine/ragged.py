"""A KV cache whose layers and heads may hold different positions: what is left once a method has chosen.

Entries keep the positions that they had, and there are holes between them; or, if the method says `compact`, they move
up to consecutive positions, and their keys are turned each time they are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cakekv.compress.base import Layer, Method
from cakekv.decode.groups import RECALL
from cakekv.embedded.executor import check
from cakekv.engine.absent import positions_of, visible
from cakekv.engine.cache import TwoEndedCache, TwoEndedLayer, numbers_of
from cakekv.engine.tap import Attending
from cakekv.engine.turning import turned
from cakekv.engine.versions import Cache, CacheLayerMixin
from cakekv.errors import BadInput
from cakekv.rotation import Rotation

if TYPE_CHECKING:
    from cakekv.decode.base import Sight

_GROWS_BY = 64
_DEAD = 0.125
"""Once this share of a layer's entries is hidden, the others move together."""


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's entries, for one sequence. Entries of a head are ordered by position; a hidden one has position -1.

    Parameters
    ----------
    keys, values : Tensor
        (kv_heads, entries, width).
    positions : Tensor
        (kv_heads, entries), int64.
    length : int
        Tokens of the sequence so far.
    window : int or None
        As in `LayerLayout`.
    rotation : Rotation or None
        Given if entries move up: how its keys are turned. `keys` are not turned then.

    Attributes
    ----------
    used : int
        Columns in use; each has an entry of at least one head.
    length : int
        Position of the next token.
    bias : Tensor or None
        (kv_heads, columns), float32: added to the logits of attention.
    shift : int
        Of a layer whose entries move up: the position of its first column, so that all layers end alike.
    memo : dict
        The method's, or the view's.
    has_dropped : bool
        Whether a method has let go of anything.
    """

    is_croppable = False
    is_initialized = True
    is_sliding = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        window: int | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self._keys, self._values, self._positions = keys, values, positions
        self.used = positions.shape[1]
        self.length = length
        self.window = window
        self.rotation = rotation
        self.shift = 0
        self.bias: torch.Tensor | None = None
        self.memo: dict[str, Any] = {}
        self.has_dropped = False
        self._hides = bool((positions < 0).any())

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        return int(self._keys.shape[0])

    @property
    def keys(self) -> torch.Tensor:
        """As attention reads them: (1, kv_heads, columns, width)."""
        return self._read_keys()[None]

    @property
    def values(self) -> torch.Tensor:
        """(1, kv_heads, columns, width)"""
        return self._values[None, :, : self.used]

    @property
    def positions(self) -> torch.Tensor:
        """(kv_heads, columns); -1 where a head has no entry."""
        return self._positions[:, : self.used]

    @property
    def visible(self) -> int:
        """How many tokens the next one would see if all were kept."""
        return self.length if self.window is None else min(self.length, self.window - 1)

    @property
    def rope_length(self) -> int:
        """What the model takes for the position of the next token."""
        return self.length if self.rotation is None else self.shift + self.used

    @property
    def held_bytes(self) -> int:
        """Bytes of its columns, those of heads that have no entry there included."""
        width = self._keys.shape[2] * self._keys.itemsize + self._values.shape[2] * self._values.itemsize
        return self.heads * self.used * width

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: it begins with entries."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the next tokens, and return all entries.

        Raises
        ------
        BadInput
            They are of several sequences, or belong to a graph of gradients.
        """
        check()
        if key_states.shape[0] != 1 or key_states.requires_grad:
            raise BadInput("a compressed cache holds one sequence, and no gradients: use it under torch.no_grad()")
        tokens = key_states.shape[2]
        self._make_room(tokens)
        new = slice(self.used, self.used + tokens)
        keys = key_states[0]
        if self.rotation is not None:
            keys = _turned(keys.float(), self.rotation, self.rope_length, -1)
        self._keys[:, new] = keys.to(self._keys.dtype)
        self._values[:, new] = value_states[0].to(self._values.dtype)
        self._positions[:, new] = torch.arange(self.length, self.length + tokens, device=self._positions.device)
        if self.bias is not None:
            self.bias[:, new] = 0.0
        self.used += tokens
        self.length += tokens
        return self.keys.to(key_states.dtype), self.values

    def mask(self, tokens: int, heads: int) -> torch.Tensor | None:
        """What the newest `tokens` see: (1, 1 or heads, tokens, columns), True or a float to add; None for everything.

        Parameters
        ----------
        tokens : int
            Queries.
        heads : int
            Heads of the queries.
        """
        if tokens == 1 and not self._hides and self.bias is None and not self._passes_window():
            return None
        seen = visible(self.positions, self.length, tokens, self.window)
        if self.bias is None and not self._hides:
            return seen[None, :1]
        per_head = heads // self.heads
        if self.bias is not None:
            bias = self.bias[:, None, : self.used].expand(-1, tokens, -1)
            seen = torch.where(seen, bias, float("-inf"))
        return seen.repeat_interleave(per_head, 0)[None]

    @property
    def planes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its memory for keys and values, (kv_heads, columns, width) each, in use or not."""
        return self._keys, self._values

    def seen(self, index: int, layers: int) -> Layer:
        """As a method sees it, without queries."""
        return Layer(
            index,
            layers,
            self._read_keys(),
            self._values[:, : self.used],
            self.positions,
            self.length,
            bias=None if self.bias is None else self.bias[:, : self.used],
            memo=self.memo,
        )

    def apply(self, kept: torch.Tensor, method: Method, seen: Layer) -> None:
        """Let go of the entries that are not kept."""
        kept = kept & (self.positions >= 0)
        if not bool(kept.any(1).all()):
            raise BadInput(f"{method.name} keeps nothing of a head of layer {seen.index}: at least one entry is needed")
        if bool((kept == (self.positions >= 0)).all()):
            return
        merged = method.merge(seen, kept)
        if merged is not None:
            keys = merged.keys
            if self.rotation is not None:
                keys = _turned(keys.float(), self.rotation, self.shift, -1)
            self._keys = keys.to(self._keys.dtype)  # not in place: it may be the memory of a cache that is being saved
            self._values = merged.values.to(self._values.dtype)
            self._positions = self.positions.clone()
            self.bias = None if self.bias is None else self.bias[:, : self.used]
            if merged.bias is not None:
                if self.bias is None:
                    self.bias = torch.zeros(self._positions.shape, dtype=torch.float32, device=self._positions.device)
                self.bias[:, : self.used] = merged.bias
        self.positions.masked_fill_(~kept, -1)
        self._hides = self.has_dropped = True
        hidden = self.used - int(kept.sum(1).max())
        if self.rotation is not None or hidden > _DEAD * self.used:
            self.close_up()

    def leave_window(self) -> None:
        """Let go of what no later token sees."""
        assert self.window is not None
        passed = int((self.positions <= self.length - self.window).all(0).sum())
        self._keys, self._values, self._positions = (
            one[:, passed:] for one in (self._keys, self._values, self._positions)
        )
        self.used -= passed

    def hide_one_more(self) -> None:
        """Put an entry in front that nothing may see, of other keys and values than any."""
        self._keys = torch.nn.functional.pad(self._keys[:, : self.used], (0, 0, 1, 0), value=1.0)
        self._values = torch.nn.functional.pad(self._values[:, : self.used], (0, 0, 1, 0), value=1e3)
        self._positions = torch.nn.functional.pad(self.positions, (1, 0), value=-1)
        self.used += 1
        self._hides = True

    def close_up(self) -> None:
        """Move the entries of every head together, to the end of as many columns as the longest head needs."""
        there = self.positions >= 0
        longest = int(there.sum(1).max())
        order = there.to(torch.int8).argsort(dim=1, stable=True)[:, self.used - longest :]
        rows = order[:, :, None]
        self._keys = self._keys.gather(1, rows.expand(-1, -1, self._keys.shape[2]))
        self._values = self._values.gather(1, rows.expand(-1, -1, self._values.shape[2]))
        self._positions = self._positions.gather(1, order)
        if self.bias is not None:
            self.bias = self.bias.gather(1, order)
        self.used = longest
        self._hides = bool((self._positions < 0).any())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `update` will return, and 0."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """What the model takes for the position of the next token."""
        return self.rope_length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        """Refused, like all that would bring back what was let go of."""
        raise BadInput("a compressed cache cannot go back: prefill the prompt again")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, of which nothing may have been let go of; `tokens_to_remove` is negative."""
        if tokens_to_remove:
            left = self.used + tokens_to_remove
            expected = torch.arange(self.length + tokens_to_remove, self.length, device=self._positions.device)
            if tokens_to_remove > 0 or left < 0 or not bool((self._positions[:, left : self.used] == expected).all()):
                self.reset()
            self.used, self.length = left, self.length + tokens_to_remove

    def _passes_window(self) -> bool:
        return self.window is not None and bool((self.positions[:, :1] <= self.length - 1 - self.window).any())

    def _read_keys(self) -> torch.Tensor:
        keys = self._keys[:, : self.used]
        return keys if self.rotation is None else _turned(keys, self.rotation, self.shift, 1)

    def _make_room(self, tokens: int) -> None:
        missing = self.used + tokens - self._keys.shape[1]
        if missing > 0:
            recall = self.memo.get(RECALL)
            if recall is not None:  # rows are being read into this memory
                recall.all()
            more = max(missing, _GROWS_BY)
            self._keys, self._values = (
                torch.nn.functional.pad(one, (0, 0, 0, more)) for one in (self._keys, self._values)
            )
            self._positions = torch.nn.functional.pad(self._positions, (0, more), value=-1)
            if self.bias is not None:
                self.bias = torch.nn.functional.pad(self.bias, (0, more))


class RaggedCache(Cache):  # type: ignore[misc]
    """What a method has left of a prompt's cache, and what an answer adds to it.

    Forwards over it go through a tap, since the heads of a layer see different things.

    Parameters
    ----------
    layers : list
        Of the model: a `RaggedLayer`, or a `DummyLayer` for one that keeps nothing.
    method : Method or None
        Goes on choosing while the text grows, if it acts at `decode`.
    sight : Sight or None
        What queries attend to, if not to everything that is there.

    Attributes
    ----------
    stored : list of RaggedLayer
        The layers that keep something.
    length : int
        Tokens of the text so far, kept or not.
    capacity : int
        Tokens that it may have.
    """

    def __init__(self, layers: list[Any], method: Method | None = None, sight: Sight | None = None) -> None:
        super().__init__(layers=layers)
        self.stored = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self.method = method
        self.sight = sight
        self.capacity = sys.maxsize
        self._is_driven = False
        self._numbers = numbers_of(layers, RaggedLayer)
        self._new: dict[int, Attending] = {}
        self._fresh = 0
        """Tokens since the method was asked last."""
        self._queries: list[torch.Tensor | None] = [None] * len(self.stored)
        self.align()

    @property
    def length(self) -> int:
        """Tokens of the text so far, kept or not."""
        return self.stored[0].length

    @property
    def held_bytes(self) -> int:
        """Memory of all layers' columns."""
        return sum(layer.held_bytes for layer in self.stored)

    @property
    def has_dropped(self) -> bool:
        """Whether a method has let go of anything."""
        return any(layer.has_dropped for layer in self.stored)

    @property
    def kept_share(self) -> float:
        """Of what the full cache would have, as entries of heads: how much is left."""
        kept = sum(int((layer.positions >= 0).sum()) for layer in self.stored)
        return kept / sum(layer.heads * layer.visible for layer in self.stored)

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Within the `with` block, a forward adds to it, and goes through its `attend`."""
        self._is_driven = True
        try:
            yield
        finally:
            self._is_driven = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's. Raises `BadInput` in a forward that does not know what is hidden."""
        if not self._is_driven:
            raise BadInput("a compressed cache goes on in engine.compute(cache, token_ids, position), not in the model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def layer_of(self, attending: Attending) -> RaggedLayer:
        """The layer that attends."""
        layer = self.layers[attending.layer]
        assert isinstance(layer, RaggedLayer)
        return layer

    def attend(self, attending: Attending) -> torch.Tensor:
        """The `Hand` of forwards over it."""
        layer = self.layer_of(attending)
        tokens, heads = attending.query.shape[2], attending.query.shape[1]
        if self.method is not None and "decode" in self.method.at:
            self._note(self._numbers[attending.layer], attending)
        mask = layer.mask(tokens, heads)
        if self.sight is None or layer.window is not None:
            return attending.attend(attending.key, attending.value, mask)
        return self.sight.attend(self._described(self._numbers[attending.layer], layer, attending), attending, mask)

    def give_up(self, length: int) -> None:
        """Forget what a forward that failed has added behind `length`."""
        for layer in self.stored:
            layer.crop(length - layer.length)
        self._queries = [None if one is None else one[:, : self._fresh] for one in self._queries]

    def grew(self, tokens: int) -> None:
        """A forward has added so many tokens: let the method choose, where it does so while a text grows."""
        method = self.method
        if method is None or "decode" not in method.at:
            return
        self._fresh += tokens
        if self._fresh < method.stride:
            return
        for number, layer in enumerate(self.stored):
            if layer.window is not None:
                layer.leave_window()
            else:
                seen = self._seen(number, layer)
                kept = method.step(seen)
                if kept is not None:
                    layer.apply(kept, method, seen)
            self._queries[number] = None
        self._fresh = 0
        self.align()

    def look(self, sight: Sight, layers: Sequence[Layer]) -> None:
        """Let a sight prepare for the steps of an answer; `layers` as for `choose`."""
        sight.prepare(layers)
        self.sight = sight

    def choose(self, method: Method, layers: Sequence[Layer]) -> None:
        """Let a method choose what to keep of a complete prompt.

        Parameters
        ----------
        method : Method
            Whose `keep` is asked.
        layers : sequence of Layer
            Of the layers that see everything, with what the method has asked for. Of the others, whose window shows
            little, all is kept.
        """
        whole = [layer for layer in self.stored if layer.window is None]
        for own, seen, mask in zip(whole, layers, method.keep(layers), strict=True):
            if mask is not None:
                own.apply(mask, method, seen)
        self.own()

    def own(self) -> None:
        """Copy what is left into memory of its own, in as many columns as its longest heads need."""
        for layer in self.stored:
            layer.close_up()
        self.align()

    def align(self) -> None:
        """Have the entries of all layers end at the same position, where they move up."""
        most = max(layer.used for layer in self.stored)
        for layer in self.stored:
            layer.shift = most - layer.used if layer.rotation is not None else 0

    def set_length(self, length: int) -> None:
        """Raises `BadInput` unless the next forward begins at `length`: what was let go of does not come back."""
        if length != self.length:
            raise BadInput(f"a compressed cache of {self.length} tokens goes on at {self.length}, not at {length}")

    def dynamic_cache(self, length: int) -> Any:
        """Refused: transformers' own cache has no holes."""
        raise BadInput("a compressed cache has holes, which transformers' own cache cannot have: give no compress")

    def _note(self, number: int, attending: Attending) -> None:
        before, new = self._queries[number], attending.query[0]
        self._queries[number] = new if before is None else torch.cat([before, new], 1)
        self._new[number] = attending

    def _seen(self, number: int, layer: RaggedLayer) -> Layer:
        queries = self._queries[number]
        assert queries is not None
        seen = self._described(number, layer, self._new[number])
        seen.queries = queries
        seen.query_positions = torch.arange(layer.length - queries.shape[1], layer.length, device=queries.device)
        return seen

    def _described(self, number: int, layer: RaggedLayer, attending: Attending) -> Layer:
        seen = layer.seen(number, len(self.stored))
        seen.queries = attending.query[0]
        seen.query_positions = torch.arange(
            layer.length - attending.query.shape[2], layer.length, device=attending.query.device
        )
        seen.scaling, seen.softcap = attending.scaling, attending.softcap
        return seen


def ragged_view(
    cache: TwoEndedCache, length: int, method: Method | None = None, rotations: Sequence[Rotation] | None = None
) -> RaggedCache:
    """All that a cache holds of a prompt of `length` tokens, in the same memory: let a method choose, or copy it.

    Parameters
    ----------
    cache : TwoEndedCache
        Covers the prompt.
    length : int
        Tokens of the prompt.
    method : Method or None
        As in `RaggedCache`.
    rotations : sequence of Rotation or None
        Given if entries move up: how the keys of each layer are turned.
    """
    turns: Iterator[Rotation | None] = iter(rotations) if rotations is not None else repeat(None)
    layers: list[Any] = []
    for layer in cache.layers:
        if not isinstance(layer, TwoEndedLayer):
            layers.append(layer)
            continue
        first = 0 if layer.window is None else max(0, layer.kept_from, length - layer.window + 1)
        keys, values = (layer.plane(number)[0, :, first:length] for number in (0, 1))
        rotation = next(turns)
        if rotation is not None:
            keys = _turned(keys.float(), rotation, first, -1)
        layers.append(RaggedLayer(keys, values, positions_of(layer, first, length), length, layer.window, rotation))
    return RaggedCache(layers, method)


def filling_view(cache: TwoEndedCache, length: int) -> RaggedCache:
    """A cache that goes on behind `length` positions, in the same memory; what is before them may still be placed."""
    layers: list[Any] = []
    for layer in cache.layers:
        if not isinstance(layer, TwoEndedLayer):
            layers.append(layer)
            continue
        positions = torch.arange(layer.capacity, device=layer.regions[0].device).repeat(layer.key_heads, 1)
        ragged = RaggedLayer(layer.plane(0)[0], layer.plane(1)[0], positions, length, layer.window)
        ragged.used = length
        layers.append(ragged)
    return RaggedCache(layers)


def _turned(keys: torch.Tensor, rotation: Rotation, start: int, sign: int) -> torch.Tensor:
    """Keys, (heads, tokens, width), turned by the positions from `start` on, or back."""
    if not rotation.frequencies:
        return keys
    cosine, sine = rotation.turns(start, keys.shape[1])
    return turned(keys, np.stack([cosine, sign * sine]), rotation.interleaved)
