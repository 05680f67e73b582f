"""The coders of a model's chunks: of those that have the usual length, and of the shorter ones that end documents."""

from __future__ import annotations

from cakekv.codec.coder import ChunkCoder
from cakekv.codec.raw import Raw
from cakekv.layout import KVLayout


class Coders:
    """Knows what chunks of any length look like.

    Parameters
    ----------
    usual : ChunkCoder
        Of chunks of the usual length.
    layout : KVLayout
        The model's.
    """

    def __init__(self, usual: ChunkCoder, layout: KVLayout) -> None:
        self.usual = usual
        self._layout = layout
        self._short: dict[int, ChunkCoder] = {}

    def of(self, tokens: int) -> ChunkCoder:
        """Of chunks of so many tokens. Those that are shorter than usual are in the exact form, whatever the codec."""
        if tokens == self.usual.exact.tokens:
            return self.usual
        coder = self._short.get(tokens)
        if coder is None:
            coder = self._short[tokens] = ChunkCoder(Raw(), self._layout, tokens, self.usual.planes_of(0)[0].dtype)
        return coder
