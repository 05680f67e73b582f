"""The fast form of a restore against the planner that ships, and by hand."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from cakekv.restore.costs import ComputeShape
from cakekv.simulate.cluster.hardware import MODELS, compute_shape
from cakekv.simulate.retention.timing import Timer, planned_seconds

FLAT = ComputeShape(0.0, 1e-3, 0.0)
"""A chunk of 100 tokens takes 0.1 s."""
H100 = compute_shape(MODELS["llama-3.1-8b"], "h100")


@pytest.mark.parametrize(
    ("load_s", "stored", "seconds", "loads"),
    [
        (0.1, "", 0.9, []),
        (0.1, "XXXXXXXX", 0.5, [7, 6, 5, 4]),  # the arms meet in the middle; then 100 tokens of suffix
        (0.1, "....XXXX", 0.5, [7, 6, 5, 4]),  # the head was not needed
        (0.1, "......XX", 0.7, [7, 6]),
        (0.1, "XXXX....", 0.7, [3, 2]),  # what is behind it can only be computed once it is there
        (0.1, "XX.XX.X.", 0.6, [4, 3, 6]),  # the load due first comes first
        (0.05, "XXXXXXXX", 0.4, [7, 6, 5, 4, 3]),
        (10.0, "XXXXXXXX", 0.9, []),
    ],
)
def test_by_hand(load_s: float, stored: str, seconds: float, loads: list[int] | list[Any]) -> None:
    timing = Timer(FLAT, 100, 100 / load_s).restored(900, [chunk == "X" for chunk in stored])
    assert timing.seconds == pytest.approx(seconds)
    assert list(timing.loads) == loads


def test_the_last_token_is_always_computed() -> None:
    timer = Timer(FLAT, 100, 1e9)
    assert timer.restored(200, [True, True]).seconds == pytest.approx(0.1, rel=1e-4)
    assert list(timer.restored(200, [True, True]).loads) == [0]
    assert timer.restored(100, [True]).seconds == timer.computed(100) == pytest.approx(0.1)


def patterns(chunks: Any, chance: Any) -> Iterator[Any]:
    """As they arise: whole prefixes, tails, scattered holes, heads and tails."""
    prefix = chance.randint(1, chunks)
    begins = chance.randint(0, prefix - 1)
    yield [place < prefix for place in range(chunks)]
    yield [begins <= place < prefix for place in range(chunks)]
    yield [chance.random() < 0.7 and place < prefix for place in range(chunks)]
    yield [place < prefix and not begins <= place < begins + 3 for place in range(chunks)]


@pytest.mark.parametrize("ratio", [0.5, 1, 4])
def test_the_planner_takes_as_long(ratio: float) -> None:
    chance = random.Random(7)
    timer = Timer(H100, 512, ratio * 16_000)
    errors = []
    for _ in range(10):
        tokens = chance.randint(1000, 30_000)
        for stored in patterns(timer.whole_chunks(tokens), chance):
            errors.append(planned_seconds(timer, tokens, stored) / timer.restored(tokens, stored).seconds - 1.0)
    assert abs(statistics.mean(errors)) < 0.02
    assert statistics.median(map(abs, errors)) < 0.01
    assert max(map(abs, errors)) < 0.25, "a chunk more or less of a short prompt is a lot"
