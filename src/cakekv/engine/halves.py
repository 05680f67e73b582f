"""A KV cache in two precisions: eight bits in two halves of four, and the newest tokens as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cakekv.codec.base import Plane
from cakekv.codec.tensors import unpacked
from cakekv.decode.quantspec import QuantSpec, Role
from cakekv.engine.ragged import RaggedCache, RaggedLayer
from cakekv.engine.tap import Attending
from cakekv.errors import BadInput

_SINKS = 4
"""What drafts from the newest tokens see of the first ones."""


class Halves:
    """A layer's keys, or its values, of its oldest tokens, as the codec `two_plane` writes them.

    Parameters
    ----------
    role : {"keys", "values"}
        Which.
    sight : QuantSpec
        How to round them.
    like : Tensor
        (heads, tokens, width), of any number of tokens: where it is.

    Attributes
    ----------
    tokens : int
        How many.
    """

    def __init__(self, role: Role, sight: QuantSpec, like: torch.Tensor) -> None:
        self.role = role
        self.heads, _, self.width = like.shape
        self.codec = sight.codec(role, self.width)
        self._across = self.width if role == "keys" else self.width // self.codec.group
        self.tokens = 0
        self._device = like.device
        scales = torch.empty(2, self.heads, 0, self._across, dtype=torch.bfloat16, device=like.device)
        codes = torch.empty(2, self.heads, 0, self.width, dtype=torch.uint8, device=like.device)
        self._scales, self._codes = scales, codes
        """Scales and lows, (2, heads, groups or tokens, width or groups); upper and lower, (2, heads, tokens / 2,
        width)."""

    def add(self, values: torch.Tensor) -> None:
        """Round the next tokens, (heads, tokens, width): whole groups of them."""
        tokens = values.shape[1]
        plane = Plane(self.role, 0, 1, self.heads, tokens, self.width)
        array = np.ascontiguousarray(values.float().cpu().numpy())
        parts = [np.empty(self.codec.size(plane, part), np.uint8) for part in range(2)]
        for part, code in enumerate(parts):
            self.codec.encode(plane, array, code, part)
        upper, lower = (torch.from_numpy(code) for code in parts)
        numbers = upper.numel() - lower.numel()
        scales = upper[:numbers].view(torch.bfloat16).view(2, self.heads, -1, self._across)
        codes = torch.stack([upper[numbers:], lower]).view(2, self.heads, -1, self.width)
        self._scales = _joined([self._scales, scales.to(self._device)], 2)
        self._codes = _joined([self._codes, codes.to(self._device)], 2)
        self.tokens += tokens

    def read(self, both: bool) -> torch.Tensor:
        """(heads, tokens, width), float32: as the upper half has them, or both."""
        shape, at = (self.heads, self._scales.shape[2], self.codec.group, self.width), 2
        if self.role == "values":
            shape, at = (self.heads, self.tokens, self._across, self.width // self._across), 3
        # The arithmetic of `TwoPlane.decode_tensors`, step by step.
        scales, lows = self._scales.float().unsqueeze(at + 1)
        values = self._levels(0).view(shape).mul_(scales).add_(lows)
        if both:
            values.add_(self._levels(1).view(shape).sub_(8).mul_(scales * (1 / 16)))
        return values.view(self.heads, self.tokens, self.width)

    def _levels(self, half: int) -> torch.Tensor:
        return unpacked(self._codes[half].reshape(1, -1), 4, self.heads, self.tokens, self.width)[0].float()

    def nbytes(self, both: bool) -> int:
        """Bytes of the upper half with its scales, or of both."""
        return self._scales.nbytes + self._codes.nbytes // (1 if both else 2)


class HalvesLayer(RaggedLayer):
    """One layer: its oldest tokens in two halves, and the newest as they are.

    Parameters
    ----------
    layer : RaggedLayer
        Which holds every token; it is not changed.
    sight : QuantSpec
        How to round, and when.

    Attributes
    ----------
    drafting : bool
        Whether reading means the cheaper view.
    """

    def __init__(self, layer: RaggedLayer, sight: QuantSpec) -> None:
        keys, values = layer.keys[0], layer.values[0]
        cut = sight.rounded(layer.length)
        exact = slice(cut, layer.length)
        super().__init__(
            keys[:, exact].clone(), values[:, exact].clone(), layer.positions[:, exact].clone(), layer.length
        )
        self.drafting = False
        self._sight = sight
        self._halves = Halves("keys", sight, keys), Halves("values", sight, values)
        if cut:
            for halves, whole in zip(self._halves, (keys, values), strict=True):
                halves.add(whole[:, :cut])

    @property
    def rounded(self) -> int:
        """Tokens that are in two halves."""
        return self._halves[0].tokens

    @property
    def keys(self) -> torch.Tensor:
        """As attention reads them: (1, kv_heads, columns, width)."""
        return self._read(0, self._keys)

    @property
    def values(self) -> torch.Tensor:
        """(1, kv_heads, columns, width)"""
        return self._read(1, self._values)

    @property
    def positions(self) -> torch.Tensor:
        """(kv_heads, columns)"""
        return self._columns().expand(self.heads, -1)

    @property
    def held_bytes(self) -> int:
        """Bytes of both halves, and of the newest tokens."""
        return sum(halves.nbytes(True) for halves in self._halves) + super().held_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that a step reads of it now."""
        upper = sum(halves.nbytes(self._reads_both) for halves in self._halves)
        if self._is_sparse:
            upper = round(upper * (len(self._columns()) - self.used) / self.rounded) if self.rounded else 0
        return upper + super().held_bytes

    @property
    def room(self) -> int:
        """Tokens that the buffer still takes."""
        return 2 * self._sight.recent + 1 - self.used

    @property
    def _is_sparse(self) -> bool:
        return self.drafting and self._sight.draft == "recent"

    @property
    def _reads_both(self) -> bool:
        return not self.drafting or self._sight.draft == "recent"

    def mask(self, tokens: int, heads: int) -> torch.Tensor | None:
        """As `RaggedLayer.mask`."""
        if tokens == 1:
            return None
        at = torch.arange(self.length - tokens, self.length, device=self._keys.device)[:, None]
        return (self._columns() <= at)[None, None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `update` will return, and 0."""
        return len(self._columns()) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, which must not be rounded yet; `tokens_to_remove` is negative."""
        if tokens_to_remove > 0 or self.used + tokens_to_remove < 0:
            raise BadInput("what is rounded cannot be taken back: prefill the prompt again")
        self.used += tokens_to_remove
        self.length += tokens_to_remove

    def flush(self) -> None:
        """Round the oldest tokens of the buffer, if it holds too many."""
        cut = self._sight.rounded(self.used)
        if cut:
            for halves, buffer in zip(self._halves, (self._keys, self._values), strict=True):
                halves.add(buffer[:, :cut])
            left = slice(cut, self.used)
            self._keys, self._values = self._keys[:, left].clone(), self._values[:, left].clone()
            self._positions = self._positions[:, left].clone()
            self.used -= cut

    def _columns(self) -> torch.Tensor:
        """Positions of the columns that are read."""
        columns = torch.arange(self.length, device=self._keys.device)
        return columns if not self._is_sparse else torch.cat([columns[: self._sinks], columns[self._cut :]])

    @property
    def _sinks(self) -> int:
        return min(_SINKS, self.rounded // 2)

    @property
    def _cut(self) -> int:
        """Where the newest tokens begin that drafts see besides the first."""
        return self.rounded - self.rounded // 2 + self._sinks

    def _read(self, number: int, buffer: torch.Tensor) -> torch.Tensor:
        rounded = self._halves[number].read(self._reads_both).to(buffer.dtype)
        if self._is_sparse:
            rounded = _joined([rounded[:, : self._sinks], rounded[:, self._cut :]], 1)
        return _joined([rounded, buffer[:, : self.used]], 1)[None]


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Parts of one type behind each other, as they are: autocast would look at their type, and refuses some."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts, dim)


class HalvesCache(RaggedCache):
    """What `QuantSpec` holds of a prompt's cache, and what an answer adds to it.

    Layers with a window, which read little, stay as they are.

    Parameters
    ----------
    cache : RaggedCache
        Of all that there is.
    sight : QuantSpec
        How to round, and when.

    Attributes
    ----------
    read_bytes : int
        Bytes that attention has read so far.
    """

    def __init__(self, cache: RaggedCache, sight: QuantSpec) -> None:
        layers: list[Any] = []
        for layer in cache.layers:
            if isinstance(layer, RaggedLayer) and layer.window is None:
                layer = HalvesLayer(layer, sight)
            elif isinstance(layer, RaggedLayer):
                layer.close_up()  # into memory of its own
            layers.append(layer)
        super().__init__(layers)
        self.read_bytes = 0
        self._rounding = [layer for layer in layers if isinstance(layer, HalvesLayer)]

    @property
    def room(self) -> int:
        """Tokens that a forward may add before some have to be rounded."""
        return min((layer.room for layer in self._rounding), default=self.capacity)

    def attend(self, attending: Attending) -> torch.Tensor:
        """The `Hand` of forwards over it."""
        layer = self.layer_of(attending)
        self.read_bytes += layer.read_bytes if isinstance(layer, HalvesLayer) else layer.held_bytes
        return super().attend(attending)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Within the `with` block, forwards read the cheaper view."""
        for layer in self._rounding:
            layer.drafting = True
        try:
            yield
        finally:
            for layer in self._rounding:
                layer.drafting = False

    def grew(self, tokens: int) -> None:
        """A forward has added tokens that stay."""
        self.settle(self.length)

    def settle(self, length: int) -> None:
        """Forget what is behind `length`; what is before it stays, and may be rounded now."""
        self.give_up(length)
        with torch.inference_mode():
            for layer in self._rounding:
                layer.flush()

    def dynamic_cache(self, length: int) -> Any:
        """Refused: transformers' own cache has one precision."""
        raise BadInput("a cache in two precisions cannot become transformers' own: give no decode")
