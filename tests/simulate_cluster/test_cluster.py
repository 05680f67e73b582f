"""The cluster on traces small enough to follow by hand, and its tiers, routing and trace reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape
from cakekv.restore.priority import POLICIES, open_policy
from cakekv.simulate.cluster.cluster import BEHAVIOURS, Cluster, Run, run_cluster
from cakekv.simulate.cluster.coarse import Machine
from cakekv.simulate.cluster.hardware import MODELS, compute_shape
from cakekv.simulate.cluster.routing import Router
from cakekv.simulate.cluster.tiers import BlockCache, Tiers, TierSize, parse_tiers
from cakekv.simulate.cluster.trace import Arrival, Trace, read_trace

MACHINE = Machine(ComputeShape(0.0, 1e-3, 0.0), ram_rate=10_000.0, layers=10)
"""1,000 tokens a second computed, 10,000 loaded from RAM."""
NO_TIER = TierSize(0, 1.0)


def cluster(nodes: int = 1, ram: int = 0, remote: int = 0, rate: float = 1000.0, limit: float | None = None) -> Cluster:
    """A token is a byte; capacities in blocks, the remote rate in tokens per second."""
    tiers = Tiers(TierSize(ram * 512, 10_000.0), TierSize(remote * 512, rate))
    return Cluster(nodes, MACHINE, 1, tiers, limit)


def serve(where: Cluster, requests: list[Arrival], system: str, policy: str = "fcfs") -> Run:
    return run_cluster(where, Trace(requests, 1e6), len(requests), 1.0, system, open_policy(policy))


def test_prompts_queue_for_a_node_and_spread_over_two() -> None:
    requests = [Arrival(0.0, 1000, [1]), Arrival(0.4, 1000, [2])]
    assert serve(cluster(1), requests, "compute").ttft_s == pytest.approx([1.0, 1.6])  # until 2.0, arrived at 0.4
    assert serve(cluster(2), requests, "compute").ttft_s == pytest.approx([1.0, 1.0])


def test_a_second_visit_loads_what_the_first_stored() -> None:
    blocks = [1, 2, 3, 4]  # 2,048 tokens
    requests = [Arrival(0.0, 2048, blocks), Arrival(10.0, 2148, blocks)]
    run = serve(cluster(ram=10), requests, "load")
    # 2,048 tokens from RAM: 0.2048 s; 100 computed: 0.1 s
    assert run.ttft_s == pytest.approx([2.048, 0.3048])
    assert run.loaded_tokens == pytest.approx({"ram": 2048.0, "remote": 0.0})
    assert run.computed_tokens == pytest.approx(2048 + 100)
    assert run.makespan_s == pytest.approx(10.3048)


def test_the_last_token_of_a_stored_prompt_is_computed() -> None:
    requests = [Arrival(0.0, 1024, [1, 2]), Arrival(10.0, 1024, [1, 2])]
    # the second block may not be used whole: 512 loaded, 512 computed
    assert serve(cluster(ram=10), requests, "load").ttft_s == pytest.approx([1.024, 0.0512 + 0.512])


def test_waiting_prompts_load_ahead() -> None:
    stored = Arrival(0.0, 2048, [1, 2, 3, 4])
    busy = Arrival(10.0, 1500, [7, 8])
    again = Arrival(10.0, 2148, [1, 2, 3, 4])
    run = serve(cluster(remote=20), [stored, busy, again], "load")
    # While the other prompt is computed until 11.5, 1,500 of 2,048 tokens arrive: 0.548 s of loading, 0.1 s of suffix.
    assert run.ttft_s[2] == pytest.approx(1.5 + 0.548 + 0.1)
    # Ours meets in the 548 that are left: 256 + 292 in chunks of 128.
    ours = serve(cluster(remote=20), [stored, busy, again], "ours")
    assert ours.ttft_s[2] == pytest.approx(1.5 + 0.292 + 0.1)


def test_a_waiting_prompt_loads_after_the_running_one() -> None:
    first, second = list(range(8)), list(range(100, 108))
    stored = [Arrival(0.0, 4096, first), Arrival(10.0, 4096, second)]
    run = serve(cluster(remote=20), [*stored, Arrival(20.0, 5096, first), Arrival(20.0, 4196, second)], "layerwise")
    # The remote tier is busy for the first until 24.096; that ends at 24.096 + 0.1. So 100 of 4,096 are loaded ahead.
    assert run.ttft_s[2] == pytest.approx(4.196)
    assert run.ttft_s[3] == pytest.approx(4.196 + 3.996 + 0.1 / 10)


def test_load_only_computes_a_ready_prompt_while_another_loads() -> None:
    stored = Arrival(0.0, 4096, list(range(8)))
    first, slow, ready = Arrival(10.0, 100, []), Arrival(10.05, 4196, list(range(8))), Arrival(10.06, 100, [])
    run = serve(cluster(remote=20, rate=1000.0), [stored, first, slow, ready], "load")
    assert run.ttft_s[3] == pytest.approx(0.1 + 0.04)  # from 10.1 to 10.2, before the older one that still loads


def test_a_shared_limit_slows_the_nodes_that_read_together() -> None:
    blocks = list(range(8))
    requests = [Arrival(0.0, 4096, blocks), Arrival(10.0, 4196, blocks), Arrival(10.0, 4196, blocks)]
    alone = serve(cluster(2, remote=20, rate=1000.0), requests, "load")
    limited = serve(cluster(2, remote=20, rate=1000.0, limit=1000.0), requests, "load")
    assert alone.ttft_s[1:] == pytest.approx([4.196, 4.196])
    assert limited.ttft_s[1] == pytest.approx(4.196)
    assert limited.ttft_s[2] == pytest.approx(8.192 + 0.1)  # two read, so half of 1,000 tokens per second


def test_a_node_whose_queue_reads_counts_for_the_shared_limit() -> None:
    blocks = list(range(8))
    computing = [Arrival(10.0, 1000, []), Arrival(10.0, 1500, [])]
    waiting = [Arrival(10.1, 4196, blocks), Arrival(10.1, 4196, blocks)]
    run = serve(cluster(2, remote=20, limit=1000.0), [Arrival(0.0, 4096, blocks), *computing, *waiting], "load")
    # Each node takes one of them. At 11.0 the first goes on with 4,096 - 900 tokens while the other node reads for the
    # second, so at 500 a second: 6.392 s and 0.1 s of suffix. The second, at 11.5: 4,096 - 1,400, likewise.
    assert run.ttft_s[3:] == pytest.approx([0.9 + 6.392 + 0.1, 1.4 + 5.392 + 0.1])


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("system", sorted(BEHAVIOURS))
def test_every_request_is_served_once_and_every_token_accounted_for(system: str, policy: str) -> None:
    trace = read_trace()
    shape = compute_shape(MODELS["llama-3.1-8b"], "h100")
    token_bytes = MODELS["llama-3.1-8b"].token_bytes
    tiers = parse_tiers("ram=4GB@200Gbps,remote=10TB@7Gbps")
    where = Cluster(2, Machine(shape, tiers.ram.bandwidth / token_bytes, 32), token_bytes, tiers)
    run = run_cluster(where, trace, 300, 30.0, system, open_policy(policy))
    shortest = [where.machine.compute_s(0, 1)] * 300
    assert (run.ttft_s >= shortest).all()
    assert (run.ttft_s < run.makespan_s).all()
    prompts = sum(request.prompt_tokens for request in trace.replay(300, 1.0))
    covered = run.computed_tokens + sum(run.loaded_tokens.values())
    assert covered >= prompts - 1
    if system in ("compute", "load", "layerwise"):
        assert covered == pytest.approx(prompts)
    assert run.busy_s <= 2 * run.makespan_s


def test_the_same_run_twice_is_the_same() -> None:
    requests = list(read_trace().replay(100, 50.0))
    runs = [serve(cluster(3, ram=100, remote=1000), requests, "ours", "marginal_saving") for _ in range(2)]
    assert np.array_equal(runs[0].ttft_s, runs[1].ttft_s)


def test_least_recently_used_blocks_go_first_from_the_tail() -> None:
    tier = BlockCache(4)
    tier.store([1, 2, 3])
    tier.store([7])
    tier.store([8])  # one too many: 3, the last of the oldest prompt
    assert len(tier) == 4
    assert tier.run([1, 2, 3]) == 2
    assert tier.run([7]) == 1
    tier.store([1])
    tier.store([9, 10])  # 2 and 7 are the oldest now
    assert (tier.run([1, 2]), tier.run([7]), tier.run([8])) == (1, 0, 1)
    assert tier.run([9, 10], 1) == 2


def test_a_tier_without_capacity_holds_nothing() -> None:
    tier = BlockCache(0)
    tier.store([1, 2])
    assert tier.run([1, 2]) == 0


def test_router_proposes_the_idlest_and_the_one_with_the_prefix() -> None:
    router = Router(3, "prefix")
    router.free_at[:] = 3.0, 1.0, 2.0
    assert router.candidates([5, 6]) == [1]
    router.served([5, 6], 0)
    router.served([5], 2)
    assert router.candidates([5, 6, 7]) == [1, 0]
    assert router.candidates([5, 8]) == [1, 2]
    blind = Router(3, "least-loaded")
    blind.served([5], 2)
    assert blind.candidates([5]) == [0]


def test_a_prompt_leaves_the_node_of_its_prefix_when_the_queue_there_is_longer_than_recomputing() -> None:
    first = Arrival(0.0, 1024, [1, 2])
    follow_ups = [Arrival(5.0, 1100, [1, 2]) for _ in range(14)]
    run = serve(cluster(2, ram=10), [first, *follow_ups], "load")
    # Each takes 0.1024 + 0.076 s with the prefix, 1.1 s without: the queue is worth it for the first six.
    assert run.computed_tokens > 1024 + 14 * 76
    assert run.ttft_s.max() < 14 * 0.1784


def test_trace_repeats_with_other_users_and_speeds_up() -> None:
    trace = Trace([Arrival(0.0, 600, [4]), Arrival(2.0, 1100, [4, 5])], period_s=3.0)
    assert list(trace.replay(4, 2.0)) == [
        Arrival(0.0, 600, [4]),
        Arrival(1.0, 1100, [4, 5]),
        Arrival(1.5, 600, [10]),
        Arrival(2.5, 1100, [10, 11]),
    ]


def test_requests_of_one_timestamp_are_spread_until_the_next(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [(3000, 600, [1, 2]), (3000, 10, [3]), (6000, 1024, [1, 4])]
    file.write_text(
        "\n".join(json.dumps({"timestamp": at, "input_length": tokens, "hash_ids": ids}) for at, tokens, ids in rows)
    )
    trace = read_trace(file)
    # 600 tokens fill one block
    assert list(trace.requests) == [Arrival(0.0, 600, [1]), Arrival(1.5, 10, []), Arrival(3.0, 1024, [1, 4])]
    assert trace.period_s == 6.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no requests"),
        ("{", "line 1 is not a request"),
        ("[]", "line 1 is not a request"),
        ('{"timestamp": 0, "input_length": 5}', "line 1 is not a request"),
        ('{"timestamp": "0", "input_length": 5, "hash_ids": []}', "line 1 is not a request"),
        ('{"timestamp": 0, "input_length": 0, "hash_ids": []}', "must be positive"),
        ('{"timestamp": -1, "input_length": 5, "hash_ids": []}', "must be positive"),
        ('{"timestamp": 0, "input_length": 1024, "hash_ids": [1]}', "one id per 512 tokens"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(BadInput, match=complaint):
        read_trace(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_trace(tmp_path / "absent.jsonl")


def test_tiers_as_written() -> None:
    assert parse_tiers("ram=64GB@200Gbps, remote=10TB@25Gbps") == Tiers(
        TierSize(64 * 10**9, 25e9), TierSize(10**13, 3.125e9)
    )
    assert parse_tiers("remote=1GB@1GB/s") == Tiers(NO_TIER, TierSize(10**9, 1e9))
    for text in ("", "disk=1GB@1GB/s", "ram=1GB", "ram=x@1GB/s", "ram=1GB@fast", "ram=1GB@unlimited"):
        with pytest.raises(BadInput):
            parse_tiers(text)
    with pytest.raises(BadInput, match="each once"):
        parse_tiers("ram=1GB@1GB/s,ram=1GB@1GB/s")
