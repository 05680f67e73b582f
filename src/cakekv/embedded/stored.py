"""What the tiers hold of prompts, and what of prompts is saved to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cakekv.codec.coder import ChunkCoder
from cakekv.codec.window import first_exact_chunk
from cakekv.embedded.lookup import Lookup
from cakekv.embedded.restorer import Restorer
from cakekv.embedded.saver import Saver, Source
from cakekv.engine.base import Engine, EngineState
from cakekv.errors import StoreError
from cakekv.explain import why_nothing_is_stored
from cakekv.keys import ChunkKey, Identity, chunk_keys
from cakekv.restore.planner import Span
from cakekv.store.base import Store
from cakekv.store.sizes import doubt_of


class Named(NamedTuple):
    """What computes a request, and its name."""

    state: EngineState
    identity: Identity


@dataclass
class Found:
    """What the tiers hold of a prompt."""

    named: Named
    """For what the model was when they were asked."""
    keys: list[ChunkKey]
    """Of its full chunks; none if there is no tier."""
    holders: list[tuple[int, ...]]
    """Per chunk, which tiers hold it in a form that will do."""
    sizes: list[int]
    """Bytes of those chunks."""
    changed: bool = False
    """Whether the model was found to be another one since."""


class StoredPrefixes:
    """Finds the chunks of prompts, and saves those that are missing.

    Parameters
    ----------
    engine : Engine
        The model.
    tenant : str
        Of the identity.
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
        tenant: str,
        coder: ChunkCoder,
        tiers: Sequence[Store],
        ask: Lookup,
        saver: Saver | None,
    ) -> None:
        self._engine = engine
        self._tenant = tenant
        self._coder = coder
        self._tiers = tiers
        self._ask = ask
        self._saver = saver
        self._introduced: set[bytes] = set()
        self._first = self._named = Named(engine.state(), self._identify())

    def now(self) -> Named:
        """What computes now, in the calling thread."""
        named, state = self._named, self._engine.state()
        if state.revision != named.state.revision:
            named = self._named = Named(state, self._identify())
        return Named(state, named.identity)

    def lookup(self, token_ids: Sequence[int], notes: list[str]) -> Found:
        """Ask all tiers for a prompt; trouble is noted, and if what computes it cannot be named."""
        named = self.now()
        unnamed = self._tiers and self._unnamed(named)
        if unnamed:
            notes.append(f"Nothing was loaded or saved, because what computes cannot be named: {unnamed}.")
        keys = chunk_keys(named.identity, token_ids) if self._tiers and not unnamed else []
        found = Found(named, keys, [()] * len(keys), [])
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

    def why_nothing(self, found: Found) -> list[str]:
        """Why nothing was found, as far as the tiers tell; asked of them only until something was saved."""
        identity = found.named.identity
        if not self._tiers or found.named.state.unnamed or identity.root in self._introduced:
            return []
        return why_nothing_is_stored(identity, self._tiers, self._ask.identities())

    def still(self, found: Found) -> bool:
        """Whether what computes has been what it was at the look-up, whenever this was asked."""
        found.changed = found.changed or self._engine.state() != found.named.state
        return not found.changed

    def save(self, cache: Any, found: Found, restorer: Restorer[Any, Any], span: Span) -> None:
        """Save the chunks that a computed span completes and that are not stored.

        Not if what it attends to is not exact, or what computes is not any more what the keys name.
        """
        keys = found.keys
        if self._saver is None or not keys or not self.still(found) or restorer.saw_lossy(span.start):
            return
        self._introduce(self._saver, found.named.identity)
        tokens = self._coder.exact.tokens
        source = Source(cache, self._engine.held_bytes(cache), restorer.missing_chunks)
        for chunk in range(span.start // tokens, min((span.start + span.tokens) // tokens, len(keys))):
            if restorer.is_missing(chunk):
                start = chunk * tokens
                gather = self._engine.gatherer(cache, start, tokens)
                exact = self._is_recent(chunk, restorer.prompt_tokens)
                self._saver.save(keys[chunk], start, gather, exact, source, restorer.lent)

    def _is_recent(self, chunk: int, prompt_tokens: int) -> bool:
        """Whether tokens of the chunk are in the window that the codec keeps exact."""
        return chunk >= first_exact_chunk(prompt_tokens, self._coder.codec.window, self._coder.exact.tokens)

    def _identify(self) -> Identity:
        return self._engine.identity(self._coder.exact.tokens, self._tenant, self._coder.codec.fingerprint)

    def _unnamed(self, named: Named) -> str:
        """Why chunks of this identity are neither loaded nor saved, in words; "" if they are."""
        if self._coder.codec.turns_back and named.identity.architecture != self._first.identity.architecture:
            return f"the codec {self._coder.codec.name} was set up for the positions that the model had before"
        return named.state.unnamed

    def _introduce(self, saver: Saver, identity: Identity) -> None:
        """Leave the model's identity in the store once, so that misses can be explained later."""
        if identity.root not in self._introduced:
            self._introduced.add(identity.root)
            saver.introduce(identity.root.hex(), identity.fields())
