"""A cluster of nodes that serve a trace: what each system makes of the same arrivals.

Coarse on purpose. Between two events of a node (a prompt arrives, a prompt is done) everything goes at constant rates,
so that the state at the next event follows in closed form. Left out: decoding (prefill nodes of a disaggregated
deployment), writing to the tiers, and batching, which prefill gains nothing from.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cakekv.restore.priority import Policy
from cakekv.simulate.cluster.coarse import Machine, cake, compute_only, layerwise, load_only, ours, ours_layered
from cakekv.simulate.cluster.node import REMOTE, Behaviour, Job, Node
from cakekv.simulate.cluster.routing import Router, Routing
from cakekv.simulate.cluster.tiers import BlockCache, Tiers
from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival, Trace

BEHAVIOURS: dict[str, Behaviour] = {
    "compute": Behaviour(compute_only, stores=False),
    "load": Behaviour(load_only, prefers_loaded=True),
    "layerwise": Behaviour(layerwise, prefers_loaded=True),
    "cake": Behaviour(cake, tiers_at_once=False),
    "ours": Behaviour(ours),
    "ours-layered": Behaviour(ours_layered),
}


@dataclass(frozen=True)
class Cluster:
    """What the systems run on.

    Parameters
    ----------
    nodes : int
        Replicas of the model.
    machine : Machine
        Costs of each.
    token_bytes : int
        Bytes of one token's KV cache.
    tiers : Tiers
        Sizes and speeds.
    remote_limit : float or None
        Bytes per second that the remote tier delivers to all nodes together. It is shared evenly by the nodes that
        read; a node notices a change at its next event.
    routing : {"prefix", "least-loaded"}
        Which node gets a request.
    admitted : int
        Prompts whose KV cache fits into a node's GPU memory at a time.
    """

    nodes: int
    machine: Machine
    token_bytes: int
    tiers: Tiers
    remote_limit: float | None = None
    routing: Routing = "prefix"
    admitted: int = 8

    def blocks(self, capacity: int) -> int:
        """How many blocks fit into `capacity` bytes."""
        return capacity // (self.token_bytes * BLOCK_TOKENS)


class Run(NamedTuple):
    """What one system made of the trace."""

    ttft_s: np.ndarray
    """Per request, in order of arrival."""
    makespan_s: float
    """From the first arrival to the last first token."""
    computed_tokens: float
    loaded_tokens: dict[str, float]
    """Per tier."""
    busy_s: float
    """Summed over the nodes: time in which compute served a prompt, waits for its loads included."""


def run_cluster(cluster: Cluster, trace: Trace, requests: int, speed_up: float, system: str, policy: Policy) -> Run:
    """Serve a trace.

    Parameters
    ----------
    cluster : Cluster
        The nodes and tiers, empty at first.
    trace : Trace
        Repeated where it is too short.
    requests : int
        How many of them.
    speed_up : float
        Factor on the trace's arrival rate.
    system : str
        A key of `BEHAVIOURS`.
    policy : Policy
        Orders the prompts that wait on one node, for both arms.
    """
    return _Simulation(cluster, BEHAVIOURS[system], policy, requests).run(trace, speed_up)


class _Simulation:
    def __init__(self, cluster: Cluster, behaviour: Behaviour, policy: Policy, requests: int) -> None:
        self.cluster = cluster
        self.behaviour = behaviour
        self.policy = policy
        self.requests = requests
        ram_blocks = cluster.blocks(cluster.tiers.ram.capacity)
        self.remote = BlockCache(cluster.blocks(cluster.tiers.remote.capacity))
        self.nodes = [Node(cluster.machine, BlockCache(ram_blocks), cluster.admitted) for _ in range(cluster.nodes)]
        self.router = Router(cluster.nodes, cluster.routing)
        self.reads_until = np.zeros(cluster.nodes)
        """Per node: when it should be through with the remote tier."""
        self.events: list[tuple[float, int]] = []
        """(time, node) at which compute is done with a prompt."""
        for node in self.nodes:
            node.remote_rate = cluster.tiers.remote.bandwidth / cluster.token_bytes
        self.ttft_s = np.zeros(requests)
        self.computed = 0.0
        self.loaded = {"ram": 0.0, "remote": 0.0}
        self.busy_s = 0.0
        self.last = 0.0

    def run(self, trace: Trace, speed_up: float) -> Run:
        for number, request in enumerate(trace.replay(self.requests, speed_up)):
            self._advance_to(request.arrived_s)
            now = request.arrived_s
            chosen, job = self._route(number, request, now)
            node = self.nodes[chosen]
            if node.queue:
                node.load_ahead(now, self.behaviour, self.policy)
            node.queue.append(job)
            node.queued_s += job.expected_s
            self.router.free_at[chosen] = max(now, float(self.router.free_at[chosen])) + job.expected_s
            if node.running is None:
                self._start(chosen, now)
            else:
                self._note_reads(chosen, now)
        self._advance_to(float("inf"))
        began = trace.requests[0].arrived_s / speed_up
        return Run(self.ttft_s, self.last - began, self.computed, self.loaded, self.busy_s)

    def _route(self, number: int, request: Arrival, now: float) -> tuple[int, Job]:
        """The node that promises the earliest first token among those that the router proposes."""
        choices = []
        for index in self.router.candidates(request.blocks):
            node = self.nodes[index]
            job = node.admit(number, request, self.remote, self.behaviour.stores)
            job.expected_s = node.finish(job, self.behaviour).seconds
            choices.append((max(now, float(self.router.free_at[index])) + job.expected_s, index, job))
        _, index, job = min(choices, key=lambda choice: choice[:2])
        return index, job

    def _advance_to(self, now: float) -> None:
        while self.events and self.events[0][0] <= now:
            at, index = heapq.heappop(self.events)
            self._done(index, at)

    def _start(self, index: int, now: float) -> None:
        node = self.nodes[index]
        self._share_remote(index, now)
        job = node.next_job(now, self.behaviour, self.policy)
        outcome = node.finish(job, self.behaviour)
        node.running = job
        node.queued_s = max(0.0, node.queued_s - job.expected_s)
        node.arm_free_at[:] = now + outcome.ram_s, now + outcome.remote_s
        ends = now + outcome.seconds
        heapq.heappush(self.events, (ends, index))
        self.router.free_at[index] = ends + node.queued_s
        self._note_reads(index, now)
        self.ttft_s[job.number] = ends - job.request.arrived_s
        self.computed += outcome.computed_tokens
        machine = node.machine
        self.loaded["ram"] += job.ram_tokens - job.ram_left + outcome.ram_s * machine.ram_rate
        ahead = job.prefix_tokens - job.ram_tokens - job.remote_left
        self.loaded["remote"] += ahead + outcome.remote_s * node.remote_rate
        self.busy_s += outcome.seconds
        self.last = max(self.last, ends)

    def _share_remote(self, index: int, now: float) -> None:
        cluster = self.cluster
        if cluster.remote_limit is not None:
            self.reads_until[index] = now
            others = int((self.reads_until > now).sum())
            bandwidth = min(cluster.tiers.remote.bandwidth, cluster.remote_limit / (others + 1))
            self.nodes[index].remote_rate = bandwidth / cluster.token_bytes

    def _note_reads(self, index: int, now: float) -> None:
        node = self.nodes[index]
        waiting = sum(job.remote_left for job in node.queue[: node.admitted])
        self.reads_until[index] = max(now, node.arm_free_at[REMOTE]) + waiting / node.remote_rate

    def _done(self, index: int, now: float) -> None:
        node = self.nodes[index]
        assert node.running is not None
        if self.behaviour.stores:
            blocks = node.running.request.blocks
            node.ram.store(blocks)
            self.remote.store(blocks)
            self.router.served(blocks, index)
        node.running = None
        if node.queue:
            node.load_ahead(now, self.behaviour, self.policy)
            self._start(index, now)
