"""The optima against brute force and hand-worked cases."""

from __future__ import annotations

import itertools
import random

import pytest

from cakekv.simulate.exact_optimum import best_seconds
from cakekv.simulate.hardware import ComputeCurve
from cakekv.simulate.optimum import Run, least_seconds, runs_of
from cakekv.simulate.rate import STEADY, Rate, pooled


def brute_force(
    curve: ComputeCurve,
    prompt: int,
    chunk: int,
    stored: tuple[bool, ...],
    token_bytes: float,
    bandwidth: Rate,
    effort: Rate,
) -> float:
    """Try every set of chunks to load; loads go in the order in which compute needs them, compute in order."""
    chunks = -(-prompt // chunk)
    loadable = [c for c in range(chunks - 1) if c < len(stored) and stored[c]]
    best = float("inf")
    for choice in itertools.product((False, True), repeat=len(loadable)):
        loaded = {c for c, chosen in zip(loadable, choice, strict=True) if chosen}
        now, first = 0.0, 0
        while first < chunks:
            if first in loaded:
                first += 1
                continue
            end = first
            while end < chunks and end not in loaded:
                end += 1
            needed = sum(c < first for c in loaded) * chunk * token_bytes
            now = max(now, bandwidth.when(needed) if needed else 0.0)
            tokens = min(end * chunk, prompt) - first * chunk
            now = effort.ends(now, curve.seconds(first * chunk, tokens))
            first = end
        best = min(best, now)
    return best


def random_case(seed: int) -> tuple[ComputeCurve, int, int, tuple[bool, ...], float, Rate, Rate]:
    rng = random.Random(seed)
    chunk = rng.randint(1, 5)
    # steps are whole chunks, and the last chunk is whole, so that every run's steps are the dynamic program's
    prompt = chunk * rng.randint(1, 9)
    curve = ComputeCurve(
        rng.uniform(0.1, 1), rng.uniform(0, 0.05), chunk * rng.randint(1, 3), rng.choice([0, 0.2, 0.9])
    )
    stored = tuple(rng.random() < 0.7 for _ in range(rng.randint(0, prompt // chunk)))
    if rng.random() < 0.5:
        return curve, prompt, chunk, stored, 10.0, Rate([rng.uniform(5, 100)]), STEADY
    bandwidth = Rate([rng.choice([0.0, 20.0, 80.0]) for _ in range(6)] + [30.0], rng.uniform(0.2, 2))
    effort = Rate([rng.choice([0.0, 0.5, 1.0]) for _ in range(6)] + [1.0], rng.uniform(0.2, 2))
    return curve, prompt, chunk, stored, 10.0, bandwidth, effort


@pytest.mark.parametrize("seed", range(150))
def test_the_schedule_is_the_best_there_is_and_the_bound_below_it(seed: int) -> None:
    case = curve, prompt, chunk, stored, token_bytes, bandwidth, effort = random_case(seed)
    exact = brute_force(*case)
    bound = least_seconds(curve, runs_of(prompt, chunk, stored), token_bytes, bandwidth, effort)
    assert bound <= exact * (1 + 1e-6)
    best = best_seconds(*case, between=(0.0, exact * 1.5), precision=1e-4)
    assert exact * (1 - 2e-4) <= best <= exact * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_in_small_pieces_without_fixed_costs_the_schedule_nears_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    curve = ComputeCurve(1e-3, 1e-5, 1, 0.0)
    stored = tuple(rng.random() < 0.8 for _ in range(120))
    bandwidth = Rate([rng.uniform(500, 20000)])
    bound = least_seconds(curve, runs_of(150, 1, stored), 10.0, bandwidth)
    best = best_seconds(curve, 150, 1, stored, 10.0, bandwidth, between=(0.0, 10.0), precision=1e-4)
    assert bound * (1 - 1e-3) <= best <= bound * 1.03


def test_one_source_no_hole() -> None:
    # 1 s per token, a token's bytes in 1 s: of 10 tokens and one of suffix, m computed and 10 - m loaded end together
    # at m = 5; then the suffix: 6 s.
    curve = ComputeCurve(1.0, 0.0, 1, 0.0)
    assert least_seconds(curve, [Run(0, 10, True), Run(10, 11, False)], 1.0, Rate([1.0])) == pytest.approx(6.0, 1e-5)


def test_attention_moves_the_meeting_point_forward() -> None:
    # Position p costs p: computing up to m takes m**2 / 2; loading the rest 10 - m: m = sqrt(21) - 1 = 3.583.
    curve = ComputeCurve(0.0, 1.0, 1, 0.0)
    runs = [Run(0, 10, True), Run(10, 10, False)]
    assert least_seconds(curve, runs, 1.0, Rate([1.0])) == pytest.approx(11 - 21**0.5, 1e-5)


def test_a_hole_is_a_deadline() -> None:
    # 4 stored, 6 missing, 2 stored, 1 missing; 1 s per token either way. Loads 2 of the first four by 2 s, computes
    # 2 + 6 by 8 s, meanwhile the other two are loaded; the suffix ends at 9 s.
    curve = ComputeCurve(1.0, 0.0, 1, 0.0)
    runs = [Run(0, 4, True), Run(4, 10, False), Run(10, 12, True), Run(12, 13, False)]
    assert least_seconds(curve, runs, 1.0, Rate([1.0])) == pytest.approx(9.0, 1e-5)


def test_a_known_future_is_used() -> None:
    # Nothing comes for 4 s, then everything at once: 10 tokens at 1 s each, computed 4, the rest loaded at 4 s.
    curve = ComputeCurve(1.0, 0.0, 1, 0.0)
    runs = [Run(0, 10, True), Run(10, 11, False)]
    assert least_seconds(curve, runs, 1.0, Rate([0.0, 1e9], 4.0)) == pytest.approx(5.0, 1e-5)


def test_runs() -> None:
    assert runs_of(10, 4, [True, True, True]) == [Run(0, 8, True), Run(8, 10, False)]
    assert runs_of(8, 4, [True, True]) == [Run(0, 7, True), Run(7, 8, False)]
    assert runs_of(12, 4, [False, True]) == [Run(0, 4, False), Run(4, 8, True), Run(8, 12, False)]


def test_trace() -> None:
    trace = Rate([2.0, 0.0, 4.0], 1.0)
    assert [trace.done(t) for t in (0.5, 1.0, 1.7, 2.5, 4.0)] == pytest.approx([1.0, 2.0, 2.0, 4.0, 10.0])
    assert [trace.when(d) for d in (1.0, 2.0, 4.0, 10.0)] == pytest.approx([0.5, 2.0, 2.5, 4.0])
    assert trace(1.0) == (0.0, 2.0)
    assert trace(3.0) == (4.0, float("inf"))
    assert trace.ends(0.5, 3.0) == pytest.approx(2.5)
    assert pooled([trace, Rate([1.0, 1.0, 1.0])]).rates == (3.0, 1.0, 5.0)
    with pytest.raises(ValueError, match="one period"):
        pooled([trace, Rate([1.0])])
    with pytest.raises(ValueError, match="positive"):
        Rate([1.0, 0.0])
