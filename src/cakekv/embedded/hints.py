"""What a caller knows of prompts to come: which to keep, to let go, and to fetch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cakekv.embedded.arms import Arms
from cakekv.embedded.stored import Lookup, StoredPrefixes
from cakekv.errors import BadInput, PinRefused, StoreError
from cakekv.keys import ChunkKey
from cakekv.prompt import Tokenized
from cakekv.quantities import real
from cakekv.results import Pinned
from cakekv.store.base import Prefetch, Store, distinct_names
from cakekv.store.pins import LONGEST_PIN_S


class Hints:
    """Tells the stores.

    Parameters
    ----------
    arms : Arms
        The model, and what its chunks look like.
    stored : StoredPrefixes
        Names the chunks of prompts.
    stores : sequence of Store
        As they were given.
    tiers : sequence of Store
        What they are made of.
    """

    def __init__(
        self, arms: Arms[Any, Any], stored: StoredPrefixes, stores: Sequence[Store], tiers: Sequence[Store]
    ) -> None:
        self._stored = stored
        self._chunk_bytes = arms.coder.exact.total_bytes
        self._names = distinct_names(tiers)
        deadline_s = arms.options.deadline_s
        self._tiers = Lookup(tiers, deadline_s, arms.hangs)
        self._stores = Lookup(stores, deadline_s, lambda store: False)

    def pin(self, prompt: Tokenized, ttl_s: float) -> Pinned:
        """As `Cake.pin`."""
        if real("ttl_s", ttl_s, 0.0, LONGEST_PIN_S) == 0.0:
            raise BadInput("ttl_s must be above 0, such as 600; to end a pin, use release()")
        keys = self._keys(prompt)
        until = time.time() + ttl_s
        if not keys:
            return Pinned(0, until, (), {})
        answers = self._tiers.each(lambda tier: tier.pin(keys[-1], keys, ttl_s, self._chunk_bytes))
        refused = {
            name: answer for name, answer in zip(self._names, answers, strict=True) if isinstance(answer, StoreError)
        }
        if len(refused) == len(answers):
            reasons = list(refused.values())
            raise next((reason for reason in reasons if isinstance(reason, PinRefused)), reasons[0])
        tiers = tuple(name for name in self._names if name not in refused)
        return Pinned(len(keys), until, tiers, {name: str(reason) for name, reason in refused.items()})

    def release(self, prompt: Tokenized) -> bool:
        """As `Cake.release`."""
        keys = self._keys(prompt)
        answers = self._tiers.each(lambda tier: tier.release(keys[-1])) if keys else []
        trouble = next((answer for answer in answers if isinstance(answer, StoreError)), None)
        if trouble is not None:
            raise trouble
        return any(answers)

    def prefetch(self, prompt: Tokenized) -> Prefetch:
        """As `Cake.prefetch`."""
        keys = self._keys(prompt)
        answers = self._stores.each(lambda store: store.prefetch(keys[-1], keys)) if keys else []
        coming = [answer for answer in answers if not isinstance(answer, StoreError)]
        if answers and not coming:
            raise next(answer for answer in answers if isinstance(answer, StoreError))
        return Prefetch(*map(sum, zip(*coming, strict=True))) if coming else Prefetch()

    def _keys(self, prompt: Tokenized) -> list[ChunkKey]:
        """Of a prompt's chunks, and those of its documents; the last one is the prompt's own, and names it."""
        if not self._names:
            raise BadInput("there is no store that could keep or fetch a prompt: give one to Cake")
        return self._stored.keys_of(prompt)
