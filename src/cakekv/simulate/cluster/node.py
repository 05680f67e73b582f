"""One node: a queue of prompts, one compute arm, and an I/O arm per tier that loads ahead for those that wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cakekv.restore.priority import Policy, RequestState
from cakekv.simulate.cluster.coarse import Machine, Outcome, System, Task
from cakekv.simulate.cluster.tiers import BlockCache
from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival

RAM, REMOTE = 0, 1


class Behaviour(NamedTuple):
    """How a system uses a node."""

    finish: System
    stores: bool = True
    """Whether it keeps KV caches at all."""
    tiers_at_once: bool = True
    prefers_loaded: bool = False
    """Whether compute passes over a prompt that is still loading while another one is ready."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on its node."""

    number: int
    request: Arrival
    ram_tokens: int
    prefix_tokens: int
    ram_left: float
    remote_left: float
    expected_s: float = 0.0

    def task(self) -> Task:
        """What is left to do."""
        prompt = self.request.prompt_tokens
        return Task(prompt, self.prefix_tokens, self.ram_tokens, self.ram_left, self.remote_left)


@dataclass(slots=True, eq=False)
class Node:
    """State of a node. Compute serves one prompt at a time; meanwhile its tiers serve that prompt first.

    Parameters
    ----------
    machine : Machine
        Its costs.
    ram : BlockCache
        Its RAM tier.
    admitted : int
        Prompts that fit into GPU memory at a time: those at the head of the queue, which may load ahead.
    """

    machine: Machine
    ram: BlockCache
    admitted: int
    queue: list[Job] = field(default_factory=list)
    running: Job | None = None
    queued_s: float = 0.0
    """Seconds that the queue should take."""
    arm_free_at: list[float] = field(default_factory=lambda: [0.0, 0.0])
    remote_rate: float = 1.0
    """Tokens per second, as of the last event."""

    def admit(self, number: int, request: Arrival, remote: BlockCache, stores: bool) -> Job:
        """Look up what is stored of a prompt; its last token is always computed."""
        usable = request.blocks[: (request.prompt_tokens - 1) // BLOCK_TOKENS] if stores else ()
        in_ram = self.ram.run(usable)
        end = remote.run(usable, in_ram)
        ram, prefix = in_ram * BLOCK_TOKENS, end * BLOCK_TOKENS
        return Job(number, request, ram, prefix, float(ram), float(prefix - ram))

    def load_ahead(self, now: float, behaviour: Behaviour, policy: Policy) -> None:
        """Let the tiers work for the waiting prompts until `now`."""
        waiting = [job for job in self.queue[: self.admitted] if job.ram_left or job.remote_left]
        remote_at = self.arm_free_at[REMOTE]
        for job in self._load_order(waiting, REMOTE, now, policy) if remote_at < now else ():
            remote_at = max(remote_at, job.request.arrived_s)
            loaded = min(job.remote_left, max(0.0, now - remote_at) * self.remote_rate)
            job.remote_left -= loaded
            remote_at += loaded / self.remote_rate
        ram_at = self.arm_free_at[RAM] if behaviour.tiers_at_once else max(self.arm_free_at[RAM], remote_at)
        for job in self._load_order(waiting, RAM, now, policy) if ram_at < now else ():
            ram_at = max(ram_at, job.request.arrived_s)
            loaded = min(job.ram_left, max(0.0, now - ram_at) * self.machine.ram_rate)
            job.ram_left -= loaded
            ram_at += loaded / self.machine.ram_rate
        self.arm_free_at[:] = max(now, self.arm_free_at[RAM]), max(now, self.arm_free_at[REMOTE])

    def next_job(self, now: float, behaviour: Behaviour, policy: Policy) -> Job:
        """Take the prompt that compute serves next out of the queue."""
        first = self.queue[0]
        window = self.queue[: self.admitted]
        if len(window) > 1:
            jobs = {str(job.number): job for job in window}
            order = policy.compute_order([self._state(job) for job in window], now)
            first = jobs[order[0].request_id]
            if behaviour.prefers_loaded:
                ready = (jobs[state.request_id] for state in order)
                first = next((job for job in ready if not job.ram_left and not job.remote_left), first)
        self.queue.remove(first)
        return first

    def finish(self, job: Job, behaviour: Behaviour) -> Outcome:
        """What comes of the job if compute and tiers serve it from now on."""
        return behaviour.finish(self.machine, job.task(), self.remote_rate)

    def _load_order(self, waiting: list[Job], tier: int, now: float, policy: Policy) -> list[Job]:
        if len(waiting) < 2:
            return waiting
        jobs = {str(job.number): job for job in waiting}
        order = policy.load_order([self._state(job, tier) for job in waiting], tier, now)
        return [jobs[state.request_id] for state in order]

    def _state(self, job: Job, tier: int = REMOTE) -> RequestState:
        load_s = {RAM: 1.0 / self.machine.ram_rate} if job.ram_left else {}
        if job.remote_left:
            load_s[REMOTE] = 1.0 / self.remote_rate
        return RequestState.prefill(
            str(job.number),
            job.request.arrived_s,
            int(job.ram_left + job.remote_left) + job.request.prompt_tokens - job.prefix_tokens,
            stored=job.prefix_tokens > 0,
            shape=self.machine.shape,
            span_tokens=self.machine.span_tokens,
            front=0,
            back=job.ram_left if tier == RAM else job.ram_tokens + job.remote_left,
            load_s=load_s,
        )
