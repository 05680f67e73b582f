"""The forecast: when a restore would end under a given assignment, and small changes that make it end sooner.

The assignment of loads (`cakekv.restore.assignment`) reasons with one figure per chunk. What it cannot see decides
short prompts and prompts with many holes: a span costs a fixed time however short it is, and loads in flight share a
tier, so that the first of them take as long as all of them. Here both arms are played to the end instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from cakekv.restore.assignment import Candidate
from cakekv.restore.situation import Moment

_COMPUTE = -1
_STRIDES = (1, 2, 4, 8)
_BETTER = 0.998
"""A change must make the restore shorter by this factor, so that noise alone changes no plan."""


class Pace(NamedTuple):
    """How a tier delivers chunks."""

    depth: int
    """Loads in flight; they share it evenly."""
    shared: bool
    """Whether a load due later waits for those in flight (see `LoadModel.is_shared`)."""


class Forecast:
    """Plays both arms to the end of what is not covered yet.

    Parameters
    ----------
    candidates : sequence of Candidate
        As for `cakekv.restore.assignment.assign_loads`; the cost of a chunk without any share of a span's fixed cost.
    tokens : sequence of int
        Their lengths.
    fixed_s : float
        Seconds that a span costs besides its chunks.
    max_span_tokens : int
        Tokens in the longest span.
    paces : sequence of Pace
        Per tier, how it delivers.
    in_flight : mapping of int to (int, float)
        For each chunk in flight, its tier and the seconds that the rest of it keeps the tier busy.
    moment : Moment
        When it begins.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        tokens: Sequence[int],
        fixed_s: float,
        max_span_tokens: int,
        paces: Sequence[Pace],
        in_flight: Mapping[int, tuple[int, float]],
        moment: Moment,
    ) -> None:
        self._chunks = [candidate[0] for candidate in candidates]
        self._costs = [candidate[1] for candidate in candidates]
        self._load_s = [candidate[2] for candidate in candidates]
        self._holders = [tuple(load_s) for load_s in self._load_s]
        self._tokens = tokens
        self._fixed_s = fixed_s
        self._longest = max_span_tokens
        self._paces = paces
        self._busy_s = moment.busy_s
        self._finish_s = moment.finish_s
        stored = [index for index, holders in enumerate(self._holders) if holders]
        self._suffix = stored[-1] + 1 if stored else 0
        self._flying = {index: in_flight[chunk] for index, chunk in enumerate(self._chunks) if chunk in in_flight}

    def labels(self, assigned: Mapping[int, int]) -> list[int]:
        """An assignment (chunk to tier) as a list: per candidate its tier, or -1 to compute it."""
        return [
            assigned.get(chunk, _COMPUTE) if holders else _COMPUTE
            for chunk, holders in zip(self._chunks, self._holders, strict=True)
        ]

    def assigned(self, labels: Sequence[int]) -> dict[int, int]:
        """The inverse of `labels`."""
        return {chunk: label for chunk, label in zip(self._chunks, labels, strict=True) if label != _COMPUTE}

    def seconds(self, labels: Sequence[int]) -> float:
        """Seconds until everything is covered."""
        done = self._loads(labels)
        longest, fixed_s, costs, chunks, tokens = self._longest, self._fixed_s, self._costs, self._chunks, self._tokens
        now, ready, begins, run, run_s, last = self._busy_s, 0.0, 0.0, 0, 0.0, -2
        for index, label in enumerate(labels):
            if label != _COMPUTE:
                ready = max(ready, done[index])
                continue
            chunk = chunks[index]
            if chunk != last + 1:
                now = max(now, begins) - (-run // longest) * fixed_s + run_s
                run, run_s = 0, 0.0
                begins = ready if index < self._suffix else ready - self._finish_s
            run += tokens[index]
            run_s += costs[index]
            last = chunk
        return max(now, begins) - (-run // longest) * fixed_s + run_s

    def _order(self, labels: Sequence[int]) -> list[list[int]]:
        """The loads before each deadline, nearest deadline first, back to front (as `Plan.ordered`)."""
        groups: list[list[int]] = []
        begins = 0
        for index, label in enumerate(labels):
            if label == _COMPUTE:
                if begins < index:
                    groups.append(list(range(index - 1, begins - 1, -1)))
                begins = index + 1
        return groups

    def _loads(self, labels: Sequence[int]) -> list[float]:
        """Seconds until each load is through."""
        done = [0.0] * len(labels)
        queues: list[list[tuple[int, int]]] = [[] for _ in self._paces]
        flying: list[list[tuple[float, int, int]]] = [[] for _ in self._paces]
        for group, indices in enumerate(self._order(labels)):
            for index in indices:
                tier = labels[index]
                if index in self._flying and self._flying[index][0] == tier:
                    flying[tier].append((self._flying[index][1], group, index))
                else:
                    queues[tier].append((group, index))
        for tier, queue in enumerate(queues):
            flows = flying[tier]
            heapify(flows)
            depth, shared = self._paces[tier]
            taken, now, served = 0, 0.0, 0.0
            while flows or taken < len(queue):
                while len(flows) < depth and taken < len(queue):
                    group, index = queue[taken]
                    if shared and any(flow[1] < group for flow in flows):
                        break
                    heappush(flows, (served + self._load_s[index][tier], group, index))
                    taken += 1
                flowing = len(flows)
                ends, _, index = heappop(flows)
                now += (ends - served) * flowing
                served = ends
                done[index] = now
        return done

    def balanced(self, labels: Sequence[int]) -> list[int]:
        """The same loads, each given to the tier that is through with it first."""
        busy_s = [0.0] * len(self._paces)
        result = list(labels)
        for indices in self._order(labels):
            for index in indices:
                if index in self._flying:
                    tier, left_s = self._flying[index]
                    busy_s[tier] += left_s
                else:
                    load_s = self._load_s[index]
                    tier = min(load_s, key=lambda holder: busy_s[holder] + load_s[holder])
                    busy_s[tier] += load_s[tier]
                result[index] = tier
        return result

    def best(self, starts: Sequence[list[int]], tries: int) -> list[int]:
        """The best of several plans, the first in doubt, changed step by step while that pays.

        Parameters
        ----------
        starts : sequence of list of int
            Plans as `labels` gives them.
        tries : int
            Changes to look at, at most.
        """
        best, best_s = starts[0], self.seconds(starts[0])
        for start in starts[1:]:
            seconds = self.seconds(start)
            if seconds < _BETTER * best_s:
                best, best_s = start, seconds
        changes = self._changes(best)
        for _ in range(tries):
            changed = next(changes, None)
            if changed is None:
                break
            seconds = self.seconds(changed)
            if seconds < _BETTER * best_s:
                best, best_s = changed, seconds
                changes = self._changes(best)
        return best

    def _changes(self, labels: Sequence[int]) -> Iterator[list[int]]:
        """Plans that differ at one end of a run of loads or of computed chunks."""
        edges = [
            index
            for index in range(1, len(labels))
            if (labels[index] == _COMPUTE) != (labels[index - 1] == _COMPUTE)
            or (self._holders[index] == ()) != (self._holders[index - 1] == ())
        ]
        for stride in _STRIDES:
            for edge in [0, *edges]:
                for indices in (range(edge, min(edge + stride, len(labels))), range(max(0, edge - stride), edge)):
                    changed = self._flipped(labels, indices)
                    if changed is not None:
                        yield changed
        if len(self._paces) > 1:
            yield from self._moved(labels)

    def _flipped(self, labels: Sequence[int], indices: range) -> list[int] | None:
        """Compute what was loaded among these, all of one kind, or load what was computed."""
        kinds = {(labels[index] == _COMPUTE, self._holders[index] == ()) for index in indices}
        if len(kinds) != 1 or (True, True) in kinds:
            return None
        changed = list(labels)
        for index in indices:
            changed[index] = self._least_busy(changed, index) if labels[index] == _COMPUTE else _COMPUTE
        return changed

    def _moved(self, labels: Sequence[int]) -> Iterator[list[int]]:
        """Give one load to another tier."""
        for index, label in enumerate(labels):
            for tier in self._holders[index]:
                if label not in (_COMPUTE, tier):
                    changed = list(labels)
                    changed[index] = tier
                    yield changed

    def _least_busy(self, labels: Sequence[int], index: int) -> int:
        def busy_s(tier: int) -> float:
            return (labels.count(tier) + 1) * load_s[tier]

        load_s = self._load_s[index]
        return min(load_s, key=busy_s)
