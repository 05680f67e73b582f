"""The planner's laws under random orders of events, failures, cancellations and stalls."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.coverage import State
from cakekv.restore.flights import Load, Tier
from cakekv.restore.layered_finish import LayeredFinish
from cakekv.restore.level_choice import LayerGroups, Level
from cakekv.restore.planner import MODES, Planner, PlannerOptions, Span, Wait

GROUPS = 3
"""The second consists of windowed layers."""


def random_starts(rng: random.Random, prompt_tokens: int, chunk_tokens: int) -> list[int]:
    """Chunks of any lengths, many of them short."""
    starts = [0]
    while starts[-1] < prompt_tokens:
        starts.append(starts[-1] + rng.choice([1, chunk_tokens, rng.randint(1, chunk_tokens)]))
    return starts[:-1]


class Driver:
    """Plays engine and loader in a random order and keeps its own record of who covered what."""

    def __init__(self, restore: Planner, tiers: int, seed: int, failing: float, slow_tier: bool) -> None:
        self.restore = restore
        self.tiers = tiers
        self.random = random.Random(seed)
        self.failing = failing
        self.slow_tier = slow_tier
        self.now = 0.0
        self.inflight: list[Load] = []
        self.placing: list[Load] = []
        self.computed: dict[int, int] = {}
        self.placed: dict[int, bool] = {}
        self.span: Span | None = None
        self.layer = 0
        self.pieces: dict[int, set[int]] = {}
        self.starts = [restore.coverage.start_of(chunk) for chunk in range(restore.coverage.chunks)]

    def run(self) -> None:
        for _ in range(200_000):
            self.now += self.random.expovariate(20.0)
            if self.span is None and self.random.random() < 0.7:
                answer = self.restore.next_compute(self.now)
                if answer is None:
                    return
                if isinstance(answer, Span):
                    self.begin(answer)
                elif not self.inflight and not self.placing:
                    assert isinstance(answer, Wait)
                    self.now = max(self.now, answer.until)
            elif self.span is not None and self.random.random() < 0.3 and self.through_the_layers(self.span):
                span, self.span = self.span, None
                self.restore.computed(span, self.now)
                for chunk in self.chunks_of(span):
                    self.computed[chunk] = self.computed.get(chunk, 0) + 1
            self.load()
        raise AssertionError("the restore did not end")

    def through_the_layers(self, span: Span) -> bool:
        """Take a layered span one step further; returns whether it is through."""
        self.restore.check_late(self.now)
        if self.restore.lost:
            if not self.restore.placing:
                self.restore.gave_up(span, self.now)
                self.span = None
                self.pieces.clear()
            return False
        while span.layered and self.layer < GROUPS and self.restore.layer_ready(self.layer):
            window = self.restore.coverage._window if self.layer == 1 else None
            seen_from = 0 if window is None else max(0, span.start - window + 1)
            for chunk in range(self.chunk_at(seen_from), self.chunk_at(span.start)):
                covered = chunk in self.computed or chunk in self.placed or self.layer in self.pieces.get(chunk, ())
                assert covered, f"layer {self.layer} of {span} reads chunk {chunk}, which is not there"
            self.layer += 1
        if span.layered and self.layer < GROUPS:
            if not self.inflight and not self.placing:
                self.now += 1.0
            return False
        return True

    def chunks_of(self, span: Span) -> range:
        first, end = self.chunk_at(span.start), span.start + span.tokens
        assert span.start == self.starts[first]
        assert end in (*self.starts, self.restore.prompt_tokens)
        return range(first, self.chunk_at(end - 1) + 1)

    def chunk_at(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1

    def begin(self, span: Span) -> None:
        assert span.tokens > 0
        self.layer = 0
        for chunk in range(0 if span.layered else self.chunk_at(span.start)):
            assert chunk in self.computed or chunk in self.placed, f"{span} reads chunk {chunk}, which is not covered"
        for chunk in self.chunks_of(span):
            assert chunk not in self.computed
            # only a chunk that came without its windowed part may be taken back
            assert self.placed.pop(chunk, False) is not True, "compute overwrites a placed chunk"
        self.check_window(span)
        self.span = span

    def check_window(self, span: Span) -> None:
        window = self.restore.coverage._window
        if window is not None:
            for position in range(max(0, span.start - window + 1), span.start):
                placed = self.placed.get(self.chunk_at(position), True)
                assert placed, f"{span} sees position {position}, loaded without its window"

    def load(self) -> None:
        tier = self.random.randrange(self.tiers)
        load = self.restore.next_load(tier, self.now)
        if load is not None:
            assert load.chunk not in self.computed
            assert load.group is not None or self.placed.pop(load.chunk, None) is not True, "loaded twice"
            self.inflight.append(load)
        if self.placing and self.random.random() < 0.8:
            load = self.placing.pop(self.random.randrange(len(self.placing)))
            assert load.chunk not in self.computed, "a placed chunk overwrites a computed one"
            assert self.span is None or load.chunk not in self.chunks_of(self.span)
            if load.group is not None:
                self.pieces.setdefault(load.chunk, set()).add(load.group)
            self.restore.placed(load, self.now)
            if self.restore.coverage.state[load.chunk] is State.LOADED:
                self.placed[load.chunk] = load.windowed
        if self.inflight and self.random.random() < 0.4:
            load = self.inflight[self.random.randrange(len(self.inflight))]
            if self.slow_tier and load.tier == 0 and self.random.random() < 0.98:
                return
            self.inflight.remove(load)
            if load.cancelled and self.random.random() < 0.5:
                self.restore.abandoned(load, load.size // 2, self.now)
            elif self.random.random() < self.failing:
                silent = self.random.random() < 0.2
                self.restore.failed(load, "corrupt: bit flip", load.size, self.now, silent=silent)
            elif self.restore.arrived(load, self.now):
                self.placing.append(load)


def check_laws(restore: Planner, driver: Driver) -> None:
    """Of a restore that has ended: every position was covered, by one arm, and the report says so."""
    chunks = len(driver.starts)
    assert restore.done
    assert all(state in (State.LOADED, State.COMPUTED) for state in restore.coverage.state)
    assert set(driver.computed) | set(driver.placed) == set(range(chunks))
    assert not set(driver.computed) & set(driver.placed)
    assert all(times == 1 for times in driver.computed.values())
    assert chunks - 1 in driver.computed, "the last token's logits are needed"
    report = restore.report()
    assert report.computed_tokens + report.loaded_tokens == restore.prompt_tokens
    assert sum(span.tokens for span in report.spans) == report.computed_tokens
    longest = max(restore.chunk_tokens, restore._situation.options.max_span_tokens)
    layered = 4 * longest  # a suffix that loads are waited for in
    assert all(span.tokens <= (longest if span.start < restore.prefix_tokens else layered) for span in report.spans)


@settings(max_examples=400, deadline=None)
@given(
    prompt=st.integers(1, 700),
    chunk=st.integers(1, 32),
    max_span=st.integers(1, 200),
    mode=st.sampled_from(MODES),
    tiers=st.integers(1, 3),
    stored_share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    failing=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    slow_tier=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 300)),
    depth=st.integers(1, 4),
    layered=st.booleans(),
    whole=st.booleans(),
    irregular=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_position_is_covered_exactly_once_whatever_happens(
    prompt: int,
    chunk: int,
    max_span: int,
    mode: str,
    tiers: int,
    stored_share: float,
    failing: float,
    slow_tier: bool,
    window: int | None,
    depth: int,
    layered: bool,
    whole: bool,
    irregular: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)
    prompt -= prompt % chunk if whole and prompt > chunk else 0
    starts = random_starts(rng, prompt, chunk) if irregular else None
    chunks = prompt // chunk if starts is None else len(starts)
    stored = [tuple(tier for tier in range(tiers) if rng.random() < stored_share) for _ in range(chunks)]
    groups = LayerGroups((chunk * 300, chunk * 300, chunk * 400), (chunk * 200, 0, chunk * 200))
    restore = Planner(
        prompt,
        chunk,
        stored,
        [Tier(f"tier{tier}", LoadCost(depth), depth) for tier in range(tiers)],
        ComputeCost(),
        [Level(None, chunk * 1000, chunk * 400, groups if layered else None)],
        PlannerOptions(mode=mode, max_span_tokens=max_span, window=window),  # type: ignore[arg-type]
        starts=starts,
    )
    driver = Driver(restore, tiers, seed, failing, slow_tier)
    driver.run()
    check_laws(restore, driver)
    report = restore.report()
    if mode == "compute":
        assert report.loaded_tokens == 0
        assert not report.loads
    if mode == "load" and failing == 0.0 and not slow_tier:
        # only what nobody stored is computed, unless a load was given up as late
        late = any(load.outcome == "late" for load in report.loads)
        chunks = len(driver.starts)
        computable = {i for i in range(chunks) if i >= len(stored) or not stored[i]} | {chunks - 1}
        assert late or set(driver.computed) <= computable


def test_layered_finishes_keep_the_laws_and_go_back_to_whole_chunks_when_a_load_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Restores made for a layered finish; some cut only the last chunks, some give up before those were asked for."""
    seen: Counter[str] = Counter()
    disband = LayeredFinish.disband

    def watched(finish: LayeredFinish) -> None:
        assert finish.pieces is not None
        seen["given up"] += 1
        seen["before all was asked for"] += bool(finish.pieces.not_begun)
        disband(finish)

    monkeypatch.setattr(LayeredFinish, "disband", watched)
    for seed in range(300):
        rng = random.Random(seed)
        chunk, tiers, depth, prefix = rng.randint(8, 32), rng.randint(1, 2), rng.randint(1, 3), rng.randint(8, 40)
        costs = [LoadCost(depth) for _ in range(tiers)]
        for cost in costs:
            cost.observe(chunk * 1000, -1.0, -1.0 + rng.uniform(0.05, 0.5))
        groups = LayerGroups((chunk * 300, chunk * 300, chunk * 400), (chunk * 300, 0, chunk * 400))
        prompt, starts = prefix * chunk + rng.randint(1, 3 * chunk), None
        if seed % 2:
            starts = random_starts(rng, prompt, chunk)
            prefix = bisect_right(starts, prefix * chunk) - 1
        restore = Planner(
            prompt,
            chunk,
            [tuple(range(tiers))] * prefix,
            [Tier(f"tier{tier}", cost, depth) for tier, cost in enumerate(costs)],
            ComputeCost(ComputeShape(1e-3, rng.uniform(0.01, 0.5), 1e-9), trusted=True),
            [Level(None, chunk * 1000, chunk * 700, groups)],
            PlannerOptions(
                window=rng.choice([None, rng.randint(1, 300)]),
                mode=rng.choice(["auto", "both"]),
                max_span_tokens=rng.choice([chunk, 4 * chunk]),
            ),
            starts=starts,
        )
        driver = Driver(restore, tiers, seed, failing=rng.choice([0.0, 0.05, 0.3]), slow_tier=False)
        driver.run()
        check_laws(restore, driver)
        loads = restore.report().loads
        pieces = {load.start for load in loads if load.group is not None}
        seen["finished layered"] += bool(pieces)
        seen["some of them whole"] += bool(pieces) and any(load.start > max(pieces) for load in loads)
    assert min(seen.values()) > 10, seen
    assert len(seen) == 4


@pytest.mark.parametrize("starts", [[], [1, 5], [0, 5, 5], [0, 11], [0, 5, 25]])
def test_chunks_that_cannot_begin_there(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot begin at"):
        Planner(20, 10, [], [], ComputeCost(), [Level.whole(1)], starts=starts)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), mode=st.sampled_from(["auto", "load", "both"]))
def test_a_tier_that_never_answers_is_computed_around(seed: int, mode: str) -> None:
    restore = Planner(
        640,
        64,
        [(0,)] * 9,
        [Tier("dead", LoadCost(2), 2)],
        ComputeCost(),
        [Level.whole(1000)],
        PlannerOptions(mode=mode, deadline_s=5.0),  # type: ignore[arg-type]
    )
    rng = random.Random(seed)
    now = 0.0
    for _ in range(10_000):
        now += rng.random()
        restore.next_load(0, now)
        answer = restore.next_compute(now)
        if answer is None:
            break
        if isinstance(answer, Span):
            now += 0.1
            restore.computed(answer, now)
        else:
            now = max(now, answer.until)
    assert restore.done
    assert restore.report().computed_tokens == 640
