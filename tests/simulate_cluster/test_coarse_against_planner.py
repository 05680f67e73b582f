"""The closed forms against the planner that ships, chunk by chunk on the virtual clock."""

from __future__ import annotations

import itertools
import statistics

import pytest

from cakekv.restore.costs import ComputeCost, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.options import Mode, PlannerOptions
from cakekv.restore.planner import Planner
from cakekv.simulate.cluster.coarse import Machine, Task, ours
from cakekv.simulate.cluster.hardware import MODELS, compute_shape
from cakekv.simulate.machine import VirtualTier, constant, run_restore

LLAMA = MODELS["llama-3.1-8b"]
CHUNK = 128
CONFIGURATIONS = [
    (gpu, ram_gbps, remote_gbps, prefix, ram_share, ahead, suffix)
    for (gpu, ram_gbps), remote_gbps, (prefix, ram_share), ahead, suffix in itertools.product(
        (("a100", 100), ("h100", 200)),
        (2, 7, 25, 100),
        itertools.product((2048, 8192, 32768), (0.0, 0.5)),
        (0.0, 0.25),
        (256, 4096),
    )
]


def fine(machine: Machine, task: Task, remote_rate: float, mode: Mode = "auto") -> float:
    """Seconds that the planner takes, knowing all costs from the start."""
    size = CHUNK * LLAMA.token_bytes
    rates = (machine.ram_rate, remote_rate, 1e12)
    tiers_of_plan = []
    for name, rate in zip(("ram", "remote", "loaded ahead"), rates, strict=True):
        load_cost = LoadCost(depth=2)
        load_cost.observe(size, 0.0, CHUNK / rate)
        tiers_of_plan.append(Tier(name, load_cost, 2))
    stored = []
    for start in range(0, task.prefix_tokens, CHUNK):
        source, left = (0, task.ram_left) if start < task.ram_tokens else (1, task.ram_tokens + task.remote_left)
        stored.append([source] if start < left else [2])
    compute = ComputeCost(machine.shape, trusted=True)
    restore = Planner(
        task.prompt_tokens,
        CHUNK,
        stored,
        tiers_of_plan,
        compute,
        [Level.whole(size)],
        PlannerOptions(mode=mode, max_span_tokens=512),
    )
    tiers = [VirtualTier(constant(rate * LLAMA.token_bytes)) for rate in rates]
    return run_restore(restore, lambda span, now: machine.shape.seconds(span.start, span.tokens), tiers)


def relative_error(
    gpu: str, ram_gbps: float, remote_gbps: float, prefix: int, ram_share: float, ahead: float, suffix: int
) -> float:
    machine = Machine(compute_shape(LLAMA, gpu), ram_gbps * 1e9 / 8 / LLAMA.token_bytes, LLAMA.layers, 512, CHUNK)
    ram = int(prefix * ram_share)
    task = Task(prefix + suffix, prefix, ram, ram * (1.0 - ahead), (prefix - ram) * (1.0 - ahead))
    remote_rate = remote_gbps * 1e9 / 8 / LLAMA.token_bytes
    return ours(machine, task, remote_rate).seconds / fine(machine, task, remote_rate) - 1.0


def test_closed_form_agrees_with_the_planner() -> None:
    """Within 1% at the median; a single chunk more or less in the landing is a lot only for a short prefix."""
    errors = {configuration: relative_error(*configuration) for configuration in CONFIGURATIONS}
    assert abs(statistics.mean(errors.values())) < 0.015
    assert statistics.median(map(abs, errors.values())) < 0.01
    assert sorted(map(abs, errors.values()))[len(errors) * 9 // 10] < 0.05
    for configuration, error in errors.items():
        prefix = configuration[3]
        assert abs(error) < (0.25 if prefix < 4096 else 0.06), (configuration, error)


def test_the_comparison_would_notice_another_planner() -> None:
    """A negative control: without loads the planner takes far longer than the closed form says."""
    machine = Machine(compute_shape(LLAMA, "a100"), 1e5, LLAMA.layers, 512, CHUNK)
    task = Task(20480, 16384, 0, 0.0, 16384.0)
    assert fine(machine, task, 20_000.0, "compute") > 1.5 * ours(machine, task, 20_000.0).seconds
    assert fine(machine, task, 20_000.0) == pytest.approx(ours(machine, task, 20_000.0).seconds, rel=0.05)
