"""What the tiers hold of prompts, and what of prompts is saved to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from cakekv.codec.coder import ChunkCoder
from cakekv.engine.base import Engine
from cakekv.errors import StoreError
from cakekv.explain import why_nothing_is_stored
from cakekv.keys import ChunkKey, Identity, chunk_keys
from cakekv.load.lookup import Lookup
from cakekv.restore.planner import Span
from cakekv.restorer import Restorer
from cakekv.save.saver import Saver, Source
from cakekv.store.base import Store
from cakekv.store.sizes import doubt_of


class Found(NamedTuple):
    """What the tiers hold of a prompt."""

    keys: list[ChunkKey]
    """Of its full chunks; none if there is no tier."""
    holders: list[tuple[int, ...]]
    """Per chunk, which tiers hold it in a form that will do."""
    sizes: list[int]
    """Bytes of those chunks."""


class StoredPrefixes:
    """Finds the chunks of prompts, and saves those that are missing.

    Parameters
    ----------
    engine : Engine
        The model.
    identity : Identity
        Whose chunks.
    coder : ChunkCoder
        What they look like.
    tiers : sequence of Store
        Where chunks may be.
    ask : Lookup
        Asks them.
    saver : Saver or None
        Saves chunks; None: they are not saved.
    """

    def __init__(
        self,
        engine: Engine[Any, Any],
        identity: Identity,
        coder: ChunkCoder,
        tiers: Sequence[Store],
        ask: Lookup,
        saver: Saver | None,
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._coder = coder
        self._tiers = tiers
        self._ask = ask
        self._saver = saver
        self._introduced = False

    def lookup(self, token_ids: Sequence[int], notes: list[str]) -> Found:
        """Ask all tiers for a prompt; trouble is noted."""
        keys = chunk_keys(self._identity, token_ids) if self._tiers else []
        found = Found(keys, [()] * len(keys), [])
        for index, (tier, sizes) in enumerate(zip(self._tiers, self._ask.sizes(keys), strict=True)):
            if isinstance(sizes, StoreError):
                notes.append(f"The {tier.name} tier could not be asked what it holds: {sizes}")
                continue
            if (doubt := doubt_of(sizes)) is not None:
                notes.append(f"Of the {tier.name} tier, {doubt}")
            for chunk, size in enumerate(sizes):
                if size is not None and (self._coder.is_exact(size) or not self._is_recent(chunk, len(token_ids))):
                    found.holders[chunk] += (index,)
                    found.sizes.append(size)
        return found

    def why_nothing(self) -> list[str]:
        """Why nothing was found, as far as the tiers tell; asked of them only until something was saved."""
        if not self._tiers or self._introduced:
            return []
        return why_nothing_is_stored(self._identity, self._tiers, self._ask.identities())

    def save(self, cache: Any, keys: list[ChunkKey], restorer: Restorer[Any, Any], span: Span) -> None:
        """Save the chunks that a computed span completes and that are not stored, if what it attends to is exact."""
        if self._saver is None or not keys or restorer.saw_lossy(span.start):
            return
        self._introduce(self._saver)
        tokens = self._coder.exact.tokens
        source = Source(cache, self._engine.held_bytes(cache), restorer.missing_chunks)
        for chunk in range(span.start // tokens, min((span.start + span.tokens) // tokens, len(keys))):
            if restorer.is_missing(chunk):
                start = chunk * tokens
                gather = partial(self._engine.gather, cache, start, tokens)
                exact = self._is_recent(chunk, restorer.prompt_tokens)
                self._saver.save(keys[chunk], start, gather, exact, source, restorer.lent)

    def _is_recent(self, chunk: int, prompt_tokens: int) -> bool:
        """Whether tokens of the chunk are in the window that the codec keeps exact."""
        return (chunk + 1) * self._coder.exact.tokens > prompt_tokens - self._coder.codec.window

    def _introduce(self, saver: Saver) -> None:
        """Leave this model's identity in the store once, so that misses can be explained later."""
        if not self._introduced:
            self._introduced = True
            saver.introduce(self._identity.root.hex(), self._identity.fields())
