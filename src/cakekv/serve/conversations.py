"""The conversations that were answered lately: listed, pinned and forgotten."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cakekv.cake import Cake
from cakekv.prompt import Tokenized
from cakekv.serve.errors import ApiError

_MOST = 200
"""Remembered per tenant."""
_WORDS = 80
"""Characters of the first message that are shown."""


@dataclass
class Conversation:
    """One conversation."""

    id: str
    first_words: str
    prompt: Tokenized
    """All of it that was computed, the last answer included."""
    last_used: float
    pinned: Tokenized | None = None
    pinned_until: float = 0.0

    def listed(self) -> dict[str, Any]:
        """As the list has it."""
        return {
            "id": self.id,
            "first_words": self.first_words,
            "tokens": len(self.prompt.token_ids),
            "last_used": self.last_used,
            "pinned": self.pinned is not None and self.pinned_until > time.time(),
            "pinned_until": self.pinned_until or None,
        }


class Conversations:
    """What is known of conversations since the server was started.

    Parameters
    ----------
    cake : Cake
        Pins and forgets their chunks.
    """

    def __init__(self, cake: Cake) -> None:
        self._cake = cake
        self._known: dict[str | None, OrderedDict[str, Conversation]] = {}

    def listed(self, tenant: str | None) -> list[dict[str, Any]]:
        """A tenant's, the latest first."""
        return [one.listed() for one in reversed(self._known.get(tenant, {}).values())]

    def note(self, name: str, first_words: str, prompt: Tokenized, answer: Sequence[int]) -> None:
        """A conversation was answered."""
        known = self._known.setdefault(prompt.tenant, OrderedDict())
        old = known.pop(name, None)
        whole = Tokenized([*prompt.token_ids, *answer], tenant=prompt.tenant)
        known[name] = one = Conversation(name, first_words.strip()[:_WORDS], whole, time.time())
        if old is not None:
            one.pinned, one.pinned_until = old.pinned, old.pinned_until
        while len(known) > _MOST:
            known.popitem(last=False)

    async def pin(self, tenant: str | None, name: str, ttl_s: float) -> None:
        """Keep a conversation's chunks; raises as `Cake.pin` does, and `ApiError` if there is no such conversation."""
        one = self._one(tenant, name)
        pinned = await self._cake.apin(one.prompt, ttl_s=ttl_s)
        old, one.pinned, one.pinned_until = one.pinned, one.prompt, pinned.until
        if old is not None and old.token_ids != one.prompt.token_ids:
            await self._cake.arelease(old)

    async def release(self, tenant: str | None, name: str) -> None:
        """End a conversation's pin."""
        one = self._one(tenant, name)
        pinned, one.pinned, one.pinned_until = one.pinned, None, 0.0
        if pinned is not None:
            await self._cake.arelease(pinned)

    async def forget(self, tenant: str | None, name: str) -> int:
        """Delete what the stores hold of a conversation; returns how many chunks."""
        one = self._one(tenant, name)
        await self.release(tenant, name)
        deleted = await self._cake._aforget(one.prompt)
        self._known[tenant].pop(name, None)
        return deleted

    def _one(self, tenant: str | None, name: str) -> Conversation:
        known = self._known.get(tenant)
        one = None if known is None else known.get(name)
        if one is None:
            raise ApiError(404, f"no conversation {name!r:.60} was answered since the server was started")
        return one
