"""The planner's protocol: what a driver asks, and what it reports.

The driver (an engine with threads, vLLM's scheduler, or a simulator with a virtual clock) asks `next_compute` whenever
compute is free and `next_load` whenever a tier has room, and reports what became of each answer. All calls must be
serialised by the driver. Times are seconds on its clock.

A load runs through `next_load` -> `arrived` (may it still be placed?) -> `placed`, or ends in `abandoned` or `failed`.
A chunk that compute claims while its load is in flight flags that load as `cancelled`; its late arrival is refused.
A layered span is claimed while chunks before it still arrive: before each layer the driver waits until `layer_ready`,
and reports `gave_up` instead of `computed` if one of them turns out to be `lost`. A driver that shares out steps of its
own uses `stepwise`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cakekv.restore.flights import Load
from cakekv.restore.front import Span


class Wait(NamedTuple):
    """Nothing to compute before a load ends; ask again after the next event, or at `until` (seconds)."""

    until: float


class PlannerProtocol(Protocol):
    """What every driver uses: `Planner` speaks it, and whatever it is compared with on the same clock.

    A driver whose loads can fail or be late needs more: see `Planner`.
    """

    def next_compute(self, now: float) -> Span | Wait | None:
        """What to compute next: a span (which is claimed), a wait for a load, or None when all is covered."""

    def computed(self, span: Span, now: float, waited_s: float = 0.0) -> None:
        """The claimed span is in the cache; its layers waited for loads for `waited_s` seconds in all."""

    def layer_ready(self, group: int) -> bool:
        """Whether the layered span that was claimed may go through this group of layers."""

    def next_load(self, tier: int, now: float) -> Load | None:
        """What the tier should load next; None: nothing is worth loading now (ask after the next event)."""

    def arrived(self, load: Load, now: float) -> bool:
        """All bytes of the load are in staging and verified. Returns whether to place them (then call `placed`)."""

    def placed(self, load: Load, now: float) -> None:
        """The load is in the cache."""

    def abandoned(self, load: Load, size: int, now: float) -> None:
        """A cancelled load was given up after `size` bytes."""
