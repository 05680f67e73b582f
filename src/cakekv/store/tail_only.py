"""Wraps a store and declines the heads of prompts, which a restore would compute anyway."""

from __future__ import annotations

from cakekv.chunk import peek_place
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey
from cakekv.store.base import Store
from cakekv.store.wrapper import WrappedStore


class TailOnlyStore(WrappedStore):
    """Another store, but for the first tokens of every prompt: their chunks are declined.

    Compute begins at the front while loads come from the back, so the head is loaded only if loading is much faster
    than computing. How much may be left out depends on both; `cakekv ask --explain` shows where they would meet.

    Parameters
    ----------
    inner : Store
        Where the other chunks go.
    skip_head : int
        Tokens; chunks that end within so many from the beginning of a prompt are not kept.

    Raises
    ------
    BadInput
        `skip_head` is negative.
    """

    def __init__(self, inner: Store, skip_head: int) -> None:
        if skip_head < 0:
            raise BadInput(f"the head to skip has at least 0 tokens, not {skip_head}")
        super().__init__(inner)
        self.skip_head = skip_head

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        position, tokens = peek_place(data)
        return position + tokens > self.skip_head and self._inner.write(key, data)
