"""Hands out loads to the workers, enough at a time to keep every tier busy, and takes in what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from time import monotonic, time

from cakekv.codec.base import Codec
from cakekv.restore.flights import Load, Tier
from cakekv.restore.priority import Policy, RequestState
from cakekv.vllm.messages import StepOrders, WorkerReport
from cakekv.vllm.scheduling.restoration import Restoration

_MOST_AHEAD = 64
"""Loads that may queue at a tier."""
_ALL = 1 << 20


class LoadDispatcher:
    """The scheduler's side of all workers' loads.

    Workers report on loads between two steps only. So as many are handed out as a tier can get through in a
    step, beside those that it is at; the workers take them in order, and drop those that compute overtakes.

    Parameters
    ----------
    tiers : sequence of Tier
        Where to load from.
    policy : Policy
        Whose loads go first.
    workers : int
        How many workers make each load.
    chunk_bytes : int
        To read for a chunk, of all workers together, as restores plan with it.

    Attributes
    ----------
    bytes_read : list of int
        Per tier, what it really reads for one, as the last request has found it: less if chunks are packed.
    """

    def __init__(self, tiers: Sequence[Tier], policy: Policy, workers: int, chunk_bytes: int) -> None:
        self.tiers = tiers
        self.workers = workers
        self.chunk_bytes = chunk_bytes
        self.bytes_read = [chunk_bytes] * len(tiers)
        self._policy = policy
        self._number = 0
        self._outstanding = [0] * len(tiers)
        """Loads per tier that some worker has not answered."""
        self._ordered: dict[int, tuple[Restoration, int, Load]] = {}
        """Those loads, by number, with their tier."""
        self._orphans: list[Restoration] = []
        """Restores that ended, of which some loads may go on."""

    def alive(self) -> set[int]:
        """The tiers that have a reader left: not all hang in loads that were given up."""
        late = self._late()
        return {number for number, tier in enumerate(self.tiers) if late[number] < tier.depth}

    def _late(self) -> list[int]:
        """Loads per tier that nobody waits for any more, and that have not ended."""
        late = [0] * len(self.tiers)
        for _, tier, load in self._ordered.values():
            late[tier] += load.late
        return late

    def seconds_per_token(self, tokens: int) -> dict[int, float]:
        """Per tier, what a token of a chunk of `tokens` takes of its time."""
        return {number: tier.cost.seconds(self.bytes_read[number]) / tokens for number, tier in enumerate(self.tiers)}

    def found(self, sizes: Sequence[int | None], codec: Codec) -> None:
        """Per tier, how large the chunks are that a request has found there, on average; None if there are none."""
        stored = [size for size in sizes if size is not None]
        if not codec.encodes:
            self.bytes_read = [
                read if size is None else size for size, read in zip(sizes, self.bytes_read, strict=True)
            ]
        elif not codec.fixed and stored:
            read = sum(codec.shares[: codec.parts_read])
            self.chunk_bytes = int(sum(stored) / len(stored) * read)
            self.bytes_read = [self.chunk_bytes] * len(self.tiers)

    def adopt(self, restoration: Restoration) -> None:
        """A restore is over: see that what it left behind is stopped."""
        self._orphans.append(restoration)

    def order(
        self,
        orders: StepOrders,
        restorations: Mapping[str, Restoration],
        states: Sequence[RequestState],
        step_s: float,
    ) -> None:
        """Put loads, and the ends of loads, into a step's orders.

        Parameters
        ----------
        orders : StepOrders
            Filled in.
        restorations : mapping
            All restores, by request.
        states : sequence of RequestState
            The same, as the policy sees them.
        step_s : float
            Seconds that the step should take; 0.0 if that is not known, or it computes nothing.
        """
        now = monotonic()
        in_pieces = any(restoration.planner.in_pieces for restoration in restorations.values())
        late = self._late()
        for number, tier in enumerate(self.tiers):
            useful = tier.depth if in_pieces else tier.useful_depth(self.bytes_read[number])
            orders.at_a_time.append(useful)
            load_s = tier.cost.seconds(self.bytes_read[number])
            ahead = min(_MOST_AHEAD, ceil(step_s / load_s)) if load_s > 0 else tier.depth
            for state in self._policy.load_order(states, number, time()):
                if not in_pieces and self._outstanding[number] - late[number] >= useful + ahead:
                    break
                restoration = restorations[state.request_id]
                may_queue = (
                    _ALL if restoration.planner.in_pieces else ahead
                )  # nothing is handed out during a layered step
                while self._outstanding[number] - late[number] < useful + may_queue:
                    order = restoration.next_load(number, self._number, now, may_queue)
                    if order is None:
                        break
                    self._ordered[self._number] = (restoration, number, restoration.load(self._number))
                    self._outstanding[number] += 1
                    self._number += 1
                    orders.loads.append(order)
        for restoration in [*self._orphans, *restorations.values()]:
            orders.cancels += restoration.new_cancels()
        self._orphans.clear()

    def receive(self, rank: int, report: WorkerReport) -> None:
        """A worker reports."""
        now = monotonic()
        begun = [(-ago_s, 1, number) for number, ago_s in report.begun.items()]
        ended = [(-result.ended_ago_s, 0, number) for number, result in report.ended.items()]
        # In the order in which it happened; when one load makes room for another, that ends first.
        for at_s, begins, number in sorted(begun + ended):
            if begins:
                if number in self._ordered:
                    self._ordered[number][0].begun(number, now + at_s)
                continue
            restoration, tier, _ = self._ordered[number]
            if restoration.ended(number, rank, report.ended[number], self.workers, now):
                del self._ordered[number]
                self._outstanding[tier] -= 1
