"""Evicts what saves the fewest seconds of compute per byte: the heads of prompts, and what nobody comes back to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cakekv.keys import ChunkKey
from cakekv.restore.costs import ComputeShape
from cakekv.store.eviction.base import Held
from cakekv.store.eviction.prompts_seen import Place, PromptsSeen
from cakekv.store.eviction.return_rates import ReturnRates
from cakekv.store.eviction.sampled import Sampled

ON_A_GPU = ComputeShape(fixed=0.0, linear=1.0, quadratic=1.0 / 16384)
"""Attention costs as much as the rest at 16k tokens of context; with 100M parameters it does at 4k, with 1B at 20k,
with 70B at 50k."""
_MOST_RETURNS = 4
_MOST_TURNS = 6
_ONE_RETURN_S = 30.0
"""A chunk that is read within so many seconds of being looked up has come back once, not twice."""
_LEAST = 0.01
"""What a part that was never needed is worth, against one that always is: of two such, the dearer one stays."""


class KeepTheTail(Sampled):
    """By the seconds of compute that a stored byte is expected to save per second for which it is kept.

    That is the price of computing it (a late chunk attends to more tokens; its bytes are as many as an early one's),
    times the share of such chunks that restores need (compute covers the head before it could be loaded, however
    popular the prompt), times the rate at which prompts like its own come back. How far the head reaches depends on
    how fast compute and tier are, which the policy need not know: share and rate are learned from what is looked up
    and read. Of chunks that nobody looks up through this store (vLLM's workers do not) the rate at which they are read
    is learned by position.

    Pricing chunks by position is Pensieve's idea (arXiv 2312.05516) and AsymCache's (arXiv 2606.02964).

    Parameters
    ----------
    cost : ComputeShape
        What computing costs; only the ratio of its linear to its quadratic part matters.
    """

    name = "keep_the_tail"
    needs_position = True

    def __init__(self, cost: ComputeShape = ON_A_GPU) -> None:
        super().__init__()
        self._cost = cost
        self._seen = PromptsSeen()
        self._rates = ReturnRates(kinds=3)
        self._kept: dict[ChunkKey, _Kept] = {}

    def saved_s_per_byte(self, chunk: Held) -> float:
        """Seconds of compute saved per byte loaded, up to a common factor."""
        seconds = self._cost.seconds(chunk.position, chunk.tokens) - self._cost.fixed
        return seconds / max(chunk.size, 1)

    def worth(self, chunk: Held, now: float) -> float:
        kept = self._kept[chunk.key]
        needed = 1.0 if kept.part is None else max(self._seen.needed(kept.part), _LEAST)
        return kept.saved_s_per_byte * needed * self._rates.rate(now - kept.seen_at, kept.classes)

    def asked(self, keys: Sequence[ChunkKey], now: float) -> None:
        super().asked(keys, now)
        held = [self.get(key) is not None for key in keys]
        self._seen.asked(keys, held)
        for key in keys:
            if key in self._held and (place := self._seen.place(key)) is not None:
                self._came_back(self._kept[key], place, self._held[key], now)

    def _came(self, chunk: Held) -> None:
        super()._came(chunk)
        kept = self._kept[chunk.key] = _Kept(self.saved_s_per_byte(chunk), chunk.used_at)
        kept.classify(chunk, self._seen.place(chunk.key))

    def _before_read(self, chunk: Held, now: float) -> None:
        self._seen.read(chunk.key)
        kept = self._kept[chunk.key]
        if kept.part is None or now - kept.seen_at > _ONE_RETURN_S:
            self._came_back(kept, self._seen.place(chunk.key), chunk, now)

    def _came_back(self, kept: _Kept, place: Place | None, chunk: Held, now: float) -> None:
        self._rates.observe(now - kept.seen_at, kept.classes, returned=True)
        kept.seen_at = max(kept.seen_at, now)
        kept.returns += 1
        kept.classify(chunk, place)

    def _redated(self, chunks: Sequence[Held], now: float) -> None:
        for kept in self._kept.values():
            kept.seen_at = min(kept.seen_at, now)

    def _victim(self, now: float) -> Held:
        chunk = super()._victim(now)
        kept = self._kept[chunk.key]
        self._rates.observe(now - kept.seen_at, kept.classes, returned=False)
        return chunk

    def _went(self, chunk: Held) -> None:
        super()._went(chunk)
        del self._kept[chunk.key]


@dataclass(slots=True)
class _Kept:
    """What is known of a chunk besides."""

    saved_s_per_byte: float
    seen_at: float
    """When it was last written, read, or looked up as part of a prompt."""
    returns: int = 0
    part: int | None = None
    classes: tuple[int, int, int] = (0, 0, 0)
    """Its position if it was never looked up; the turn of its conversation if it was; how often it came back."""

    def classify(self, chunk: Held, place: Place | None) -> None:
        returns = min(self.returns, _MOST_RETURNS)
        if place is None:
            self.classes = (1 + int(2.0 * math.log2(chunk.position + 1.0)), 0, returns)
        else:
            self.part = place.part
            self.classes = (0, min(place.turn, _MOST_TURNS), returns)
