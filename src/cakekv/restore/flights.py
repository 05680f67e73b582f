"""Loads in flight: how many each tier has, when they should end, and which have been waited for long enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cakekv.restore.costs import LoadModel

_PATIENCE_S = 30.0
"""How long a load of a tier of unknown speed is waited for where there is no deadline."""

LEAST_PATIENCE_S = 2.0
"""A load from a source of known speed is waited for at least this long, unless a deadline ends that."""


class Tier(NamedTuple):
    """A tier to load from."""

    name: str
    cost: LoadModel
    depth: int
    """Loads to keep in flight, at the most."""

    def useful_depth(self, size: int) -> int:
        """Loads of `size` bytes to keep in flight."""
        return min(self.depth, self.cost.useful_loads(size))


@dataclass(eq=False, slots=True)
class Load:
    """Load this chunk, or a part of it. `cancelled` turns True when nobody needs it any more."""

    chunk: int
    start: int
    tokens: int
    tier: int
    windowed: bool
    """Whether layers with a sliding window need their part, too."""
    size: int
    """Bytes to read."""
    began: float
    """When it was handed out; of one that had to queue, once that is known, when its tier began with it."""
    group: int | None = None
    """Load only this group of layers (see `layered_finish`); None: all that are needed."""
    parts: int | None = None
    """Read only so many parts of it (see `level_choice`); None: as many as the codec says."""
    queued: bool = False
    """Whether the tier has not begun with it yet."""
    cancelled: bool = False
    late: bool = False
    moved: bool = False
    """Whether it was cancelled because another tier is asked for the chunk."""
    alone: bool = True
    """Whether the tier had no other load in flight so far."""

    @property
    def why_cancelled(self) -> str:
        """As in `LoadRecord.outcome`."""
        return "late" if self.late else "moved" if self.moved else "overtaken"


class Flights:
    """Keeps count of the loads that were handed out.

    Parameters
    ----------
    tiers : sequence of Tier
        The tiers.
    deadline_s : float
        As in `PlannerOptions`.
    """

    def __init__(self, tiers: Sequence[Tier], deadline_s: float = math.inf) -> None:
        self._tiers = tiers
        self._deadline_s = deadline_s
        self.any_begun = False
        """Whether any load was ever handed out."""
        self._wanted: dict[tuple[int, int | None], Load] = {}
        """Loads that were neither answered nor cancelled, by chunk and group."""
        self._flying: dict[Load, None] = {}
        """Loads that were not answered yet, cancelled ones included."""
        self._outstanding = [0] * len(tiers)
        """How many of them each tier has."""
        self._stuck = [0] * len(tiers)
        """How many of them are late."""

    def has_room(self, tier: int, size: int, ahead: int = 0) -> bool:
        """Whether the tier should be given another load, of about `size` bytes, if `ahead` may queue."""
        outstanding, depth = self._outstanding[tier], self._tiers[tier].depth
        useful = self._tiers[tier].useful_depth(size)
        return outstanding < depth + ahead and outstanding - self._stuck[tier] < useful + ahead

    def stalled(self, tier: int) -> bool:
        """Whether the tier hangs: all of its workers do, in loads that are late, or nothing came since one began."""
        began = [load.began for load in self._flying if load.late and load.tier == tier]
        last = self._tiers[tier].cost.last_completed
        return len(began) >= self._tiers[tier].depth or (bool(began) and (last is None or last <= min(began)))

    def begin(self, load: Load, may_queue: bool = False) -> None:
        """A load was handed out; if it may, it queues while the tier is at as many as keep it busy."""
        self.any_begun = True
        useful = self._tiers[load.tier].useful_depth(load.size)
        reading = [other for other in self._read_now(load.tier) if not other.late]
        load.queued = may_queue and len(reading) >= useful
        if not load.queued:
            self.started(load)
        self._wanted[load.chunk, load.group] = load
        self._flying[load] = None
        self._outstanding[load.tier] += 1

    def started(self, load: Load) -> None:
        """The tier begins with the load."""
        load.queued = False
        others = [other for other in self._read_now(load.tier) if other is not load]
        load.alone = not others
        for other in others:
            other.alone = False

    def _read_now(self, tier: int) -> list[Load]:
        return [load for load in self._flying if load.tier == tier and not load.queued]

    def wanted(self, tier: int) -> list[Load]:
        """The loads of the tier that were neither answered nor cancelled."""
        return [load for load in self._wanted.values() if load.tier == tier]

    def of_chunk(self, chunk: int, group: int | None = None) -> Load | None:
        """The load of the chunk, or of a group of its layers, that is in flight and wanted."""
        return self._wanted.get((chunk, group))

    def cancel(self, load: Load) -> None:
        """Nobody needs the load any more."""
        load.cancelled = True
        self._wanted.pop((load.chunk, load.group), None)

    def cancel_all(self) -> None:
        """Nobody needs any load any more."""
        for load in list(self._wanted.values()):
            self.cancel(load)

    def answered(self, load: Load, size: int, now: float) -> bool:
        """The tier is through with the load, after `size` bytes. Returns whether its speed was unknown before."""
        self._flying.pop(load, None)
        self._outstanding[load.tier] -= 1
        if load.late:
            self._stuck[load.tier] -= 1
        cost = self._tiers[load.tier].cost
        news = not cost.known
        cost.observe(size, load.began, now, load.alone and not load.cancelled)
        return news

    def land(self, load: Load) -> None:
        """The load is in place, or has failed."""
        self._wanted.pop((load.chunk, load.group), None)

    def give_up_late(self, now: float) -> list[Load]:
        """Cancel the loads that have been waited for long enough, and return those that were still wanted.

        Others, which nobody waits for, keep their tier from what is wanted; so they are counted as late as well.
        """
        late = [load for load in self._flying if not load.late and now >= self._deadline(load)]
        wanted = [load for load in late if self._wanted.get((load.chunk, load.group)) is load]
        for load in late:
            load.late = True
            self._stuck[load.tier] += 1
        for load in wanted:
            self.cancel(load)
        return wanted

    def give_up(self, tier: int) -> list[Load]:
        """Cancel the loads of a tier that does not answer, and return those that were still wanted."""
        wanted = self.wanted(tier)
        for load in self._flying:
            if load.tier == tier and not load.late:
                load.late = True
                self._stuck[tier] += 1
        for load in wanted:
            self.cancel(load)
        return wanted

    def nothing_since(self, load: Load) -> bool:
        """Whether its tier has delivered nothing since the load began."""
        last = self._tiers[load.tier].cost.last_completed
        return last is None or last <= load.began

    def next_look(self, now: float) -> float:
        """When a wait should be thought over: a while after the next load should have ended, or must have."""
        looks = [now + 1.0]
        for load in self._wanted.values():
            looks += [self._deadline(load), now + max(0.02, self._tiers[load.tier].cost.duration(load.size))]
        return max(min(looks), now + 1e-3)

    def busy_seconds(self, tier: int, size: int, unknown_s: float, now: float) -> float:
        """Seconds that `size` more bytes keep the tier busy; `unknown_s` if nothing is known of it.

        Grows while the tier has loads in flight and delivers nothing.
        """
        cost = self._tiers[tier].cost
        expected = self._usual_seconds(tier, size, unknown_s)
        waiting = self.wanted(tier)
        if not waiting:
            return expected
        since = min(load.began for load in waiting)
        silent_s = now - max(since, cost.last_completed or since)
        longest = max(load.size for load in waiting)
        usual_s = self._usual_seconds(tier, longest, unknown_s)
        overdue_s = silent_s - max(usual_s, cost.duration(longest))
        return expected * max(1.0, overdue_s / usual_s) if usual_s else max(0.0, overdue_s)

    def _usual_seconds(self, tier: int, size: int, unknown_s: float) -> float:
        cost = self._tiers[tier].cost
        return cost.seconds(size) if cost.known else unknown_s

    def remaining_seconds(self, unknown_s: float, now: float) -> tuple[dict[int, float], dict[int, float]]:
        """For each chunk in flight, the seconds it keeps its tier busy, and the seconds until it is in place.

        The loads in flight of a tier share its bandwidth evenly: one that began with others ends with them. Those
        that queue follow one after the other.
        """
        remaining: dict[int, float] = {}
        ends_s: dict[int, float] = {}
        for index in range(len(self._tiers)):
            waiting = [load for load in self._wanted.values() if load.tier == index]
            loads = sorted((load for load in waiting if not load.queued), key=_age)
            alone = []
            for load in loads:
                each = self.busy_seconds(index, load.size, unknown_s, now)
                shared = (now - load.began) / len(loads)
                overdue = shared - self._usual_seconds(index, load.size, unknown_s)
                alone.append((max(each - shared, 0.5 * overdue, 0.02 * each), load))
            alone.sort(key=_left)
            flowing, before, ended = len(alone), 0.0, 0.0
            for left, load in alone:
                ends = ended + (left - before) * flowing
                remaining[load.chunk] = remaining.get(load.chunk, 0.0) + left
                ends_s[load.chunk] = ends
                flowing, before, ended = flowing - 1, left, ends
            for load in waiting:
                if load.queued:
                    left = self.busy_seconds(index, load.size, unknown_s, now)
                    ended += left
                    remaining[load.chunk] = remaining.get(load.chunk, 0.0) + left
                    ends_s[load.chunk] = ended
        return remaining, ends_s

    def _deadline(self, load: Load) -> float:
        cost = self._tiers[load.tier].cost
        since = load.began
        if load.queued and cost.last_completed is not None:
            since = max(since, cost.last_completed)  # it waits for those before it, and they come
        return since + patience_s(cost, load.size, self._deadline_s)


def patience_s(cost: LoadModel, size: int, deadline_s: float) -> float:
    """How many seconds a load of `size` bytes is waited for; `deadline_s` as in `PlannerOptions`."""
    if cost.known:
        return min(max(LEAST_PATIENCE_S, 10.0 * cost.duration(size)), deadline_s)
    return _PATIENCE_S if deadline_s == math.inf else deadline_s


def _age(load: Load) -> float:
    return load.began


def _left(entry: tuple[float, Load]) -> float:
    return entry[0]
