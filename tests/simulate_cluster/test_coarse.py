"""The closed forms on cases worked out by hand, and what holds for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakekv.restore.costs import ComputeShape
from cakekv.simulate.cluster.cluster import BEHAVIOURS
from cakekv.simulate.cluster.coarse import Machine, Task

SYSTEMS = {name: behaviour.finish for name, behaviour in BEHAVIOURS.items()}

LINEAR = Machine(ComputeShape(0.0, 1e-3, 0.0), ram_rate=10_000.0, layers=10, span_tokens=500, chunk_tokens=100)
"""1,000 tokens a second, wherever they stand."""
REMOTE = 1000.0


def seconds(system: str, task: Task, machine: Machine = LINEAR) -> float:
    return SYSTEMS[system](machine, task, REMOTE).seconds


def test_compute_and_load_alone() -> None:
    task = Task(5000, 4000, 1000, 1000.0, 3000.0)
    assert seconds("compute", task) == pytest.approx(5.0)
    # RAM: 1,000 / 10,000 = 0.1 s beside remote: 3,000 / 1,000 = 3 s; then 1,000 tokens of suffix: 1 s
    assert seconds("load", task) == pytest.approx(4.0)


def test_layerwise_hides_all_but_a_layer_of_the_shorter() -> None:
    # 3 s of loading over 10 layers, 1 s of suffix: the last layer's 0.1 s come after the last load
    assert seconds("layerwise", Task(5000, 4000, 1000, 1000.0, 3000.0)) == pytest.approx(3.1)
    # 0.5 s of loading, 1 s of suffix: the first layer's 0.05 s come before
    assert seconds("layerwise", Task(1500, 500, 0, 0.0, 500.0)) == pytest.approx(1.05)


def test_both_arms_meet_in_the_middle_of_equal_speeds() -> None:
    task = Task(5000, 4000, 0, 0.0, 4000.0)
    outcome = SYSTEMS["ours"](LINEAR, task, REMOTE)
    assert outcome == pytest.approx((3.0, 3000.0, 0.0, 2.0))  # 2,000 from each side, then the suffix


def test_cake_ends_with_the_span_in_which_the_arms_meet() -> None:
    # They meet at 3,700 / 2 = 1,850; the span that compute is in ends at 2,000: 2 s and 1 s of suffix.
    task = Task(4700, 3700, 0, 0.0, 3700.0)
    assert seconds("cake", task) == pytest.approx(3.0)
    # In chunks of 100: compute 1,800 and wait for 1,900 to arrive, or the other way round: 1.9 s.
    assert seconds("ours", task) == pytest.approx(2.9)


def test_cake_computes_a_span_where_loading_would_be_done_at_once() -> None:
    # RAM delivers 400 tokens in 0.04 s; Cake's compute has begun its span of 400 by then.
    task = Task(1400, 400, 400, 400.0, 0.0)
    assert seconds("cake", task) == pytest.approx(0.4 + 1.0)
    assert seconds("ours", task) == pytest.approx(0.04 + 1.0)


def test_cake_uses_one_tier_at_a_time_ours_both() -> None:
    task = Task(7000, 6000, 2000, 2000.0, 4000.0)
    # Cake: remote loads from the back; compute walks through the 2,000 in RAM by itself; they meet at 3,000.
    assert seconds("cake", task) == pytest.approx(3.0 + 1.0)
    # Ours: in chunks, compute takes 200 (0.2 s) while RAM delivers 1,800. Then 3,800 are left, met after 1.9 s.
    assert seconds("ours", task) == pytest.approx(0.2 + 1.9 + 1.0)


def test_cake_meets_in_ram_when_the_remote_tier_is_done_first() -> None:
    # Remote delivers its 1,000 by 1 s, when compute is at 1,000. Then 3,950 - 1,000 in RAM are left for 1,000 a second
    # from the front and 10,000 from the back: met after 2,950 / 11,000 = 0.27 s at 1,268, whose span ends at 1,500.
    assert seconds("cake", Task(5050, 4950, 3950, 3950.0, 1000.0)) == pytest.approx(1.5 + 0.1)


def test_what_was_loaded_ahead_is_skipped() -> None:
    # 2,000 of the 4,000 were loaded while the prompt waited: 1,000 from each side.
    assert seconds("ours", Task(5000, 4000, 0, 0.0, 2000.0)) == pytest.approx(2.0)
    assert seconds("ours", Task(5000, 4000, 0, 0.0, 0.0)) == pytest.approx(1.0)


def test_layered_finish_loads_while_the_suffix_is_computed() -> None:
    # Compute stops at m so that m + 0.9 of the 1 s of suffix takes as long as loading 4,000 - m: m = 1,550,
    # in chunks 1,500: the loads end at 2.5 s, the suffix's last layer 0.1 s later. Or 1,600: 1.6 s and then 1 s.
    assert seconds("ours-layered", Task(5000, 4000, 0, 0.0, 4000.0)) == pytest.approx(2.6)


def layer_by_layer(machine: Machine, front_s: float, load_s: float, suffix_s: float) -> float:
    now = front_s
    for layer in range(machine.layers):
        arrived = load_s * (layer + 1) / machine.layers
        now = max(now, arrived) + suffix_s / machine.layers
    return now


@pytest.mark.parametrize("rate", [200.0, 1000.0, 3000.0, 50_000.0])
@pytest.mark.parametrize("suffix", [100, 1000, 6000])
def test_layered_finish_is_the_best_that_waiting_layer_by_layer_allows(rate: float, suffix: int) -> None:
    suffix_s = LINEAR.compute_s(4000, suffix)
    best = min(
        layer_by_layer(LINEAR, LINEAR.compute_s(0, met), (4000 - met) / rate, suffix_s) for met in range(0, 4001, 100)
    )
    outcome = SYSTEMS["ours-layered"](LINEAR, Task(4000 + suffix, 4000, 0, 0.0, 4000.0), rate)
    assert outcome.seconds == pytest.approx(best)


def test_layered_finish_of_a_short_load_is_layerwise() -> None:
    # 0.5 s of loads under 1 s of suffix: nothing is left for compute to help with.
    task = Task(1500, 500, 0, 0.0, 500.0)
    assert seconds("ours-layered", task) == seconds("layerwise", task) == pytest.approx(1.05)


def test_attention_makes_late_tokens_dearer() -> None:
    machine = Machine(ComputeShape(0.0, 1e-3, 1e-6), 10_000.0, 10, 500, 100)
    # 2,000 tokens from position 1,000 on: 2,000 * (1 ms + 1 µs * (1,000 + 1,000)) = 6 s
    assert machine.compute_s(1000, 2000) == pytest.approx(6.0)
    met = machine.meeting(0, 4000.0, REMOTE)
    assert machine.compute_s(0, met) == pytest.approx((4000.0 - met) / REMOTE)


TASKS = st.builds(
    lambda ram, remote, suffix, ahead: Task(
        128 * (ram + remote) + suffix, 128 * (ram + remote), 128 * ram, 128 * ram * ahead, 128 * remote * ahead
    ),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(1, 20_000),
    st.sampled_from([0.0, 0.3, 1.0]),
)
MACHINES = st.builds(
    lambda fixed, linear, quadratic, ram: Machine(ComputeShape(fixed, linear, quadratic), ram, 32),
    st.sampled_from([0.0, 5e-3]),
    st.sampled_from([2e-5, 1e-3]),
    st.sampled_from([0.0, 1e-9, 1e-7]),
    st.sampled_from([1e4, 2e5]),
)


@given(machine=MACHINES, task=TASKS, rate=st.sampled_from([100.0, 5e3, 3e4, 1e6]))
def test_ours_is_never_slower_than_either_arm_alone(machine: Machine, task: Task, rate: float) -> None:
    load, compute, ours, layered = (
        SYSTEMS[name](machine, task, rate).seconds for name in ("load", "compute", "ours", "ours-layered")
    )
    assert ours <= load + 1e-9
    # It cuts the prompt at the tiers' borders, each of which may cost a span's fixed time.
    assert ours <= compute + 3 * machine.shape.fixed + 1e-9
    assert layered <= min(ours, SYSTEMS["layerwise"](machine, task, rate).seconds)


@given(machine=MACHINES, task=TASKS, rate=st.sampled_from([100.0, 5e3, 3e4, 1e6]), name=st.sampled_from(list(SYSTEMS)))
def test_every_position_is_covered(machine: Machine, task: Task, rate: float, name: str) -> None:
    outcome = SYSTEMS[name](machine, task, rate)
    loaded = outcome.ram_s * machine.ram_rate + outcome.remote_s * rate
    ahead = 0.0 if name == "compute" else task.prefix_tokens - task.ram_left - task.remote_left
    assert outcome.computed_tokens + loaded + ahead >= task.prompt_tokens - 1e-3
    assert min(outcome) >= 0
    assert max(outcome.ram_s, outcome.remote_s) <= outcome.seconds + 1e-9
