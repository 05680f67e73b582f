"""The shape of a model's KV cache in plain numbers: what one layer keeps for one token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class PlaneLayout:
    """One array of a layer, usually its keys or its values.

    Parameters
    ----------
    heads : int
        Number of KV heads.
    width : int
        Elements per head and token (keys and values may differ, as in multi-head latent attention).
    itemsize : int
        Bytes per element.
    """

    heads: int
    width: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.heads * self.width * self.itemsize


@dataclass(frozen=True)
class LayerLayout:
    """One attention layer.

    Parameters
    ----------
    planes : tuple of PlaneLayout
        Usually (keys, values).
    window : int or None
        A query at position p sees the positions in (p - window, p]; None: all of them.
    """

    planes: tuple[PlaneLayout, ...]
    window: int | None = None

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token in this layer."""
        return sum(plane.token_bytes for plane in self.planes)


@dataclass(frozen=True)
class KVLayout:
    """All layers of a model."""

    layers: tuple[LayerLayout, ...]

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @cached_property
    def window(self) -> int | None:
        """The widest sliding window of any layer, or None if every layer sees everything."""
        return max((layer.window for layer in self.layers if layer.window is not None), default=None)

    @cached_property
    def unwindowed(self) -> tuple[int, ...]:
        """Indices of the layers that see every position."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.window is None)

    def segment_bytes(self, tokens: int) -> tuple[int, ...]:
        """Bytes of each layer's segment in a chunk of `tokens` tokens.

        A segment is the layer's planes one after the other, each a C-ordered array (heads, tokens, width).
        """
        return tuple(layer.token_bytes * tokens for layer in self.layers)
