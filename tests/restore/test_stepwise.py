"""A driver that shares out steps of its own: spans that end within chunks, loads that queue, a covered beginning."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures
from cakekv.restore.coverage import State
from cakekv.restore.flights import Flights, Load, Tier
from cakekv.restore.level_choice import LayerGroups, Level
from cakekv.restore.planner import MODES, PlannerOptions
from cakekv.restore.stepwise import StepwisePlanner
from tests.restore.test_planner_laws import random_starts


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 1500),
    st.sampled_from([16, 64, 128]),
    st.sampled_from(MODES),
    st.integers(0, 10_000),
    st.floats(0, 0.3),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_every_position_is_covered_once(
    prompt_tokens: int,
    chunk_tokens: int,
    mode: str,
    seed: int,
    failing: float,
    covered_share: float,
    whole: bool,
    irregular: bool,
) -> None:
    """Steps of any size, loads that end in any order, late, failed or overtaken."""
    chance = random.Random(seed)
    prompt_tokens -= prompt_tokens % chunk_tokens if whole and prompt_tokens > chunk_tokens else 0
    covered = int(covered_share * (prompt_tokens - 1))
    starts = random_starts(chance, prompt_tokens, chunk_tokens) if irregular else None
    chunks = prompt_tokens // chunk_tokens if starts is None else len(starts)
    stored = [(0,) if chance.random() < 0.8 else () for _ in range(chunks)]
    tier = Tier("tier", LoadCost(2), 2)
    restore = StepwisePlanner(
        prompt_tokens,
        chunk_tokens,
        stored,
        [tier],
        ComputeCost(),
        [Level.whole(1000)],
        PlannerOptions(mode=mode, max_span_tokens=256),  # type: ignore[arg-type]
        covered_tokens=covered,
        starts=starts,
    )
    owners = ["before"] * covered + [""] * (prompt_tokens - covered)
    now, flying = 0.0, list[Load]()
    for _ in range(10_000):
        if restore.done:
            break
        now += chance.expovariate(10.0)
        tokens = restore.computable_tokens(now)
        assert tokens == 0 or restore.position == owners.index("")
        span = restore.take(chance.randint(1, tokens), now) if tokens and chance.random() < 0.8 else None
        while (load := restore.next_load(0, now, ahead=3)) is not None:
            flying.append(load)
        assert len(flying) <= 5
        assert sum(not load.queued for load in flying) <= 2 or any(load.cancelled for load in flying)
        for load in flying[: chance.randint(0, len(flying))]:
            flying.remove(load)
            began = now
            now += chance.expovariate(50.0)
            if load.queued:
                restore.begun(load, began)
            if load.cancelled:
                restore.abandoned(load, 500, now)
            elif chance.random() < failing:
                restore.failed(load, "store failed", 500, now)
            elif restore.arrived(load, now):
                restore.placed(load, now)
                for position in range(load.start, load.start + load.tokens):
                    assert not owners[position]
                    if position < prompt_tokens - 1:  # that one is computed, whatever is in its row
                        owners[position] = "load"
        if span is not None:
            now += 0.01
            restore.computed(span, now)
            for position in range(span.start, span.start + span.tokens):
                assert not owners[position]
                owners[position] = "compute"
    assert restore.done
    assert all(owners)
    assert restore.position == prompt_tokens
    assert restore.report().computed_tokens == owners.count("compute")
    assert restore.report().loaded_tokens == owners.count("load")


def test_compute_that_enters_a_chunk_owns_it() -> None:
    restore = StepwisePlanner(
        1024,
        128,
        [(0,)] * 7,
        [Tier("tier", LoadCost(2), 2)],
        ComputeCost(),
        [Level.whole(1000)],
        PlannerOptions(mode="both"),
    )
    loads = [restore.next_load(0, 0.0, ahead=10) for _ in range(8)]
    span = restore.take(200, 0.0)
    overtaken = [load.chunk for load in loads if load is not None and load.cancelled]
    assert overtaken == [chunk for chunk in (1, 0) if any(load and load.chunk == chunk for load in loads)]
    restore.computed(span, 1.0)
    assert restore.coverage.state[:2] == [State.COMPUTED, State.COMPUTING]
    assert restore.position == 200
    assert restore.take(56, 1.0).start == 200


def test_a_load_that_queues_is_late_only_if_nothing_moves() -> None:
    cost = LoadCost(1)
    cost.observe(1000, 0.0, 0.1)
    flights = Flights([Tier("tier", cost, 1)])
    loads = [Load(chunk, 0, 1, 0, True, 1000, 0.0) for chunk in range(3)]
    for load in loads:
        flights.begin(load, may_queue=True)
    assert [load.queued for load in loads] == [False, True, True]
    flights.answered(loads[0], 1000, 2.1)
    flights.land(loads[0])
    assert flights.give_up_late(2.2) == []
    assert flights.give_up_late(50.0) == loads[1:]
    more = [Load(chunk, 0, 1, 0, True, 1000, 50.0) for chunk in (3, 4)]
    for load in more:
        flights.begin(load, may_queue=True)
    assert [load.queued for load in more] == [False, True]  # late ones that never began take nobody's place


def test_loads_that_queue_end_one_after_the_other() -> None:
    cost = LoadCost(1)
    cost.observe(1000, 0.0, 1.0)
    flights = Flights([Tier("tier", cost, 1)])
    for chunk in (5, 4, 3):
        flights.begin(Load(chunk, 0, 1, 0, True, 1000, 1.0), may_queue=True)
    remaining, ends_s = flights.remaining_seconds(1.0, 1.0)
    assert remaining[5] == remaining[4] == remaining[3]
    assert ends_s[5] < ends_s[4] < ends_s[3]


def test_no_load_is_waited_for_longer_than_the_deadline() -> None:
    cost = LoadCost(1)
    cost.observe(1000, 0.0, 1.0)
    flights = Flights([Tier("tier", cost, 1)], deadline_s=0.5)
    load = Load(0, 0, 1, 0, True, 1000, 1.0)
    flights.begin(load, may_queue=True)
    assert flights.give_up_late(1.4) == []
    assert flights.give_up_late(1.5) == [load]


def test_what_is_covered_already_is_neither_computed_nor_loaded() -> None:
    shape = ComputeShape(0.0, 1e-3, 0.0)
    restore = StepwisePlanner(
        1000,
        128,
        [(0,)] * 7,
        [Tier("tier", LoadCost(2), 2)],
        ComputeCost(shape, trusted=True),
        [Level.whole(1)],
        covered_tokens=300,
    )
    assert restore.position == 300
    assert restore.coverage.state[:3] == [State.COMPUTED, State.COMPUTED, State.COMPUTING]
    chunks = []
    while (load := restore.next_load(0, 0.0, ahead=20)) is not None:
        chunks.append(load.chunk)
    assert min(chunks) > 2


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 12), st.integers(1, 64), st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.3]), st.integers(1, 2)
)
def test_a_layered_suffix_sees_all_that_it_attends_to(
    chunks: int, suffix: int, seed: int, failing: float, tiers: int
) -> None:
    """Steps of any size; the suffix's may be layered, refused to be so, lost, or given up though nothing is."""
    chance, tokens_of = random.Random(seed), 16
    size = tokens_of * 100
    figures = LoadFigures(byte_s=0.5 / size, load_s=0.5, alone_s=0.5, load_bytes=size)
    restore = StepwisePlanner(
        chunks * tokens_of + suffix,
        tokens_of,
        [range(tiers)] * chunks,
        [Tier(f"tier {number}", LoadCost(2, figures), 2) for number in range(tiers)],
        ComputeCost(ComputeShape(0.1, 0.08, 0.0), trusted=True),
        [Level.whole(size, LayerGroups((600, 500, 500), (600, 500, 500)))],
        PlannerOptions(max_span_tokens=64),
    )
    now, flying = 0.0, list[Load]()
    placed: dict[int, set[int]] = {}
    computed = [False] * restore.prompt_tokens

    def load_some() -> None:
        nonlocal now
        for tier in range(tiers):
            while (load := restore.next_load(tier, now, ahead=1000 if restore.in_pieces else 1)) is not None:
                flying.append(load)
        for load in flying[: chance.randint(0, 4)]:
            flying.remove(load)
            if load.queued:
                restore.begun(load, now)
            now += chance.expovariate(4.0)
            if load.cancelled:
                restore.abandoned(load, 100, now)
            elif chance.random() < failing:
                restore.failed(load, "store failed", 100, now)
            elif restore.arrived(load, now):
                restore.placed(load, now)
                assert not any(computed[load.start : load.start + load.tokens])
                placed.setdefault(load.chunk, set()).update({load.group} if load.group is not None else range(3))

    for _ in range(10_000):
        if restore.done:
            break
        now += chance.expovariate(10.0)
        restore.layered_allowed = chance.random() < 0.8
        tokens = restore.computable_tokens(now)
        assert not tokens or not restore.in_pieces
        if tokens:
            span = restore.take(chance.randint(1, tokens), now)
        elif restore.layered_tokens and chance.random() < 0.5:
            span = restore.take_layered(now)
            assert span.start + span.tokens == restore.prompt_tokens == restore.position
        else:
            load_some()
            continue
        load_some()
        given_up, group = False, 0
        while span.layered and group < 3 and not given_up:
            if restore.layer_ready(group):
                for chunk in range(chunks):
                    assert computed[chunk * tokens_of] or group in placed[chunk]
                group += 1
            else:
                load_some()
                restore.check_late(now)
                given_up = restore.lost or chance.random() < 0.02
        if given_up:
            restore.gave_up(span, now)
            assert restore.position <= span.start
            for chunk in range(chunks):
                if restore.coverage.state[chunk] < State.LOADED:
                    placed.pop(chunk, None)
            continue
        now += 0.01
        restore.computed(span, now)
        computed[span.start : span.start + span.tokens] = [True] * span.tokens
    assert restore.done
    assert all(computed[chunk * tokens_of] or len(placed[chunk]) == 3 for chunk in range(chunks))
