"""What a node's tiers do for the prompts that wait, and who is served next."""

from __future__ import annotations

import pytest

from cakekv.restore.costs import ComputeShape
from cakekv.restore.priority import open_policy
from cakekv.simulate.cluster.cluster import BEHAVIOURS
from cakekv.simulate.cluster.coarse import Machine
from cakekv.simulate.cluster.node import Job, Node
from cakekv.simulate.cluster.tiers import BlockCache
from cakekv.simulate.cluster.trace import Arrival

FCFS, MARGINAL = open_policy("fcfs"), open_policy("marginal_saving", starvation_s=100.0)
OURS, CAKE = BEHAVIOURS["ours"], BEHAVIOURS["cake"]


def node(*jobs: Job) -> Node:
    """RAM delivers 2,000 tokens a second, the remote tier 1,000; late tokens cost more to compute."""
    machine = Machine(ComputeShape(0.0, 1e-3, 1e-7), ram_rate=2000.0, layers=10)
    answer = Node(machine, BlockCache(0), admitted=8)
    answer.remote_rate = 1000.0
    answer.queue.extend(jobs)
    return answer


def job(number: int, ram: int = 0, remote: int = 0, arrived_s: float = 0.0, suffix: int = 100) -> Job:
    request = Arrival(arrived_s, ram + remote + suffix, [])
    return Job(number, request, ram, ram + remote, float(ram), float(remote))


def left(jobs: list[Job]) -> list[tuple[float, float]]:
    return [(job.ram_left, job.remote_left) for job in jobs]


def test_both_tiers_load_at_once_one_prompt_after_the_other() -> None:
    jobs = [job(0, ram=1000, remote=600), job(1, ram=3000, remote=2000)]
    node(*jobs).load_ahead(1.0, OURS, FCFS)
    # In one second: RAM 1,000 and then 1,000 of the next; remote 600 and then 400 of the next.
    assert left(jobs) == [(0.0, 0.0), (2000.0, 1600.0)]


def test_cake_turns_to_ram_when_the_remote_tier_is_through() -> None:
    jobs = [job(0, ram=3000, remote=600)]
    node(*jobs).load_ahead(1.0, CAKE, FCFS)
    assert left(jobs) == [(3000.0 - 0.4 * 2000.0, 0.0)]
    jobs = [job(0, ram=3000, remote=1000)]
    node(*jobs).load_ahead(1.0, CAKE, FCFS)
    assert left(jobs) == [(3000.0, 0.0)]


def test_time_is_spent_once() -> None:
    jobs = [job(0, ram=9000, remote=9000)]
    busy = node(*jobs)
    busy.load_ahead(1.0, OURS, FCFS)
    busy.load_ahead(1.0, OURS, FCFS)
    busy.load_ahead(1.5, OURS, FCFS)
    assert left(jobs) == [(9000.0 - 3000.0, 9000.0 - 1500.0)]


def test_nothing_is_loaded_before_a_prompt_arrives_or_while_the_tier_serves_the_running_one() -> None:
    jobs = [job(0, ram=9000, remote=9000, arrived_s=0.75)]
    busy = node(*jobs)
    busy.arm_free_at[:] = 0.9, 0.0  # RAM, remote
    busy.load_ahead(1.0, OURS, FCFS)
    assert left(jobs) == [pytest.approx((9000.0 - 0.1 * 2000.0, 9000.0 - 0.25 * 1000.0))]


def test_prompts_that_do_not_fit_into_gpu_memory_wait_with_their_loads() -> None:
    jobs = [job(number, remote=100) for number in range(10)]
    node(*jobs).load_ahead(5.0, OURS, FCFS)
    assert [job.remote_left for job in jobs] == [0.0] * 8 + [100.0] * 2


def test_the_policy_orders_loads_and_compute() -> None:
    # Long prefixes first for I/O, since their last tokens are the dearest to compute; short ones first for compute.
    short, long = job(0, remote=1000), job(1, remote=4000, arrived_s=0.0)
    node(short, long).load_ahead(1.0, OURS, MARGINAL)
    assert left([short, long]) == [(0.0, 1000.0), (0.0, 3000.0)]
    assert node(long, short).next_job(1.0, OURS, MARGINAL) is short
    late = job(2, remote=1000, arrived_s=0.5)
    assert node(late, long).next_job(1.0, OURS, FCFS) is long


def test_cake_serves_prompts_without_a_stored_prefix_first() -> None:
    stored, plain = job(0, remote=1000), job(1, suffix=5000, arrived_s=0.5)
    queue = node(stored, plain)
    assert queue.next_job(1.0, CAKE, open_policy("cake")) is plain
    assert queue.next_job(1.0, CAKE, open_policy("cake")) is stored
    assert not queue.queue
