"""Finds what the tiers hold of a prompt, and saves what they lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

from cakekv.codec.base import first_exact_chunk
from cakekv.codec.coder import ChunkCoder
from cakekv.embedded.lookup import Lookup
from cakekv.embedded.saver import Saver, Source
from cakekv.engine.base import Engine, EngineState
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey, Identity, chunk_keys
from cakekv.store.base import Store
from cakekv.store.maintenance.explain import why_nothing_is_stored
from cakekv.store.sizes import doubt_of

CHANGED = "The model changed while this request was computed, which is partly what it was before; no more was saved."


class Named(NamedTuple):
    """What computes a request, and its name."""

    state: EngineState
    identity: Identity


@dataclass
class Found:
    """What the tiers hold of a prompt."""

    engine: Engine[Any, Any]
    named: Named
    """What the model was when they were asked."""
    keys: list[ChunkKey]
    """Of the prompt's full chunks; none if there is no tier."""
    holders: list[tuple[int, ...]]
    """Per chunk, which tiers hold it in a form that will do."""
    sizes: list[int]
    """Bytes of those chunks."""
    exact_from: int
    """The first chunk that must not be lossy, since the codec's window reaches it."""
    lookup_s: float = 0.0
    """Seconds that asking took."""
    changed: bool = False
    """Whether the model was found to be another one since."""

    def still(self) -> bool:
        """Whether what computes has been what it was at the look-up, whenever this was asked."""
        self.changed = self.changed or self.engine.state() != self.named.state
        return not self.changed


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
        self._first = self._named = Named(engine.state(), self._identify())

    def now(self) -> Named:
        """What computes now, in the calling thread."""
        named, state = self._named, self._engine.state()
        if state.revision != named.state.revision:
            named = self._named = Named(state, self._identify())
        return Named(state, named.identity)

    def lookup(self, token_ids: Sequence[int], notes: list[str]) -> Found:
        """Ask all tiers for a prompt; trouble is noted, and if what computes it cannot be named."""
        began, named = monotonic(), self.now()
        unnamed = self._tiers and self._unnamed(named)
        if unnamed:
            notes.append(f"Nothing was loaded or saved, because what computes cannot be named: {unnamed}.")
        keys = chunk_keys(named.identity, token_ids) if self._tiers and not unnamed else []
        exact_from = first_exact_chunk(len(token_ids), self._coder.codec.window, self._coder.exact.tokens)
        found = Found(self._engine, named, keys, [()] * len(keys), [], exact_from)
        for index, (tier, sizes) in enumerate(zip(self._tiers, self._ask.sizes(keys), strict=True)):
            if isinstance(sizes, StoreError):
                notes.append(f"The {tier.name} tier could not be asked what it holds: {sizes}")
                continue
            if (doubt := doubt_of(sizes)) is not None:
                notes.append(f"Of the {tier.name} tier, {doubt}")
            for chunk, size in enumerate(sizes):
                if size is not None and (chunk < exact_from or self._coder.is_exact(size)):
                    found.holders[chunk] += (index,)
                    found.sizes.append(size)
        found.lookup_s = monotonic() - began
        return found

    def why_nothing(self, found: Found) -> list[str]:
        """Why nothing was found, as far as the tiers tell; asked of them only until something was saved."""
        identity = found.named.identity
        saved = self._saver is not None and self._saver.knows(identity)
        if not self._tiers or found.named.state.unnamed or saved:
            return []
        return why_nothing_is_stored(identity, self._tiers, self._ask.identities())

    def saver(
        self, cache: Any, found: Found, waiting: Callable[[], AbstractContextManager[None]]
    ) -> PromptSaver | None:
        """What saves a prompt's chunks out of its cache; None if they are not saved."""
        return PromptSaver(self._saver, self._coder, cache, found, waiting) if self._saver and found.keys else None

    def _identify(self) -> Identity:
        return self._engine.identity(self._coder.exact.tokens, self._tenant, self._coder.codec.fingerprint)

    def _unnamed(self, named: Named) -> str:
        """Why chunks of this identity are neither loaded nor saved, in words; "" if they are."""
        if self._coder.codec.turns_back and named.identity.architecture != self._first.identity.architecture:
            return f"the codec {self._coder.codec.name} was set up for the positions that the model had before"
        return named.state.unnamed


class PromptSaver:
    """Saves what is computed of one prompt.

    Parameters
    ----------
    saver : Saver
        Takes the chunks.
    coder : ChunkCoder
        What they look like.
    cache : Cache
        The engine's, in which they are.
    found : Found
        The prompt's keys.
    waiting : callable
        As in `Saver.save`.
    """

    def __init__(
        self,
        saver: Saver,
        coder: ChunkCoder,
        cache: Any,
        found: Found,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._saver = saver
        self._chunk_tokens = coder.exact.tokens
        self._cache = cache
        self._found = found
        self._waiting = waiting

    def save(self, chunks: Sequence[int], wanted_chunks: int, *, exact: bool) -> None:
        """Save chunks that a span has completed, unless what computes is not any more what the keys name.

        Parameters
        ----------
        chunks : sequence of int
            Those that no tier has.
        wanted_chunks : int
            About how many chunks of the prompt are to be saved, these among them.
        exact : bool
            Whether all that the span attended to is exact. If it is not, nothing is saved.
        """
        found, engine, tokens = self._found, self._found.engine, self._chunk_tokens
        if not found.still() or not exact:
            return
        self._saver.introduce(found.named.identity)
        source = Source(self._cache, engine.held_bytes(self._cache), wanted_chunks)
        for chunk in chunks:
            gather = engine.gatherer(self._cache, chunk * tokens, tokens)
            is_exact = chunk >= found.exact_from
            self._saver.save(found.keys[chunk], chunk * tokens, gather, is_exact, source, self._waiting)
