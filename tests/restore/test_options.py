"""What a planner refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from cakekv.restore.costs import ComputeCost, LoadCost
from cakekv.restore.flights import Flights, Load, Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Planner, PlannerOptions


@pytest.mark.parametrize(
    ("options", "says"),
    [({"mode": "fast"}, "unknown mode 'fast': choose one of auto"), ({"max_span_tokens": 0}, "max_span_tokens=0")],
)
def test_options_check_themselves(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PlannerOptions(**options)


@pytest.mark.parametrize(
    ("prompt", "chunk", "covered", "says"),
    [(0, 64, 0, "at least one token"), (64, 64, 64, "at least one token"), (64, 0, 0, "chunk_tokens=0")],
)
def test_lengths_that_make_no_sense_are_refused(prompt: int, chunk: int, covered: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Planner(prompt, chunk, [], [], ComputeCost(), [Level.whole(1)], covered_tokens=covered)


def test_without_a_level_no_chunk_could_be_read() -> None:
    with pytest.raises(ValueError, match="give at least one level"):
        Planner(64, 64, [], [], ComputeCost(), [])


@pytest.mark.parametrize(("options", "seconds"), [({}, 30.0), ({"deadline_s": 5.0}, 5.0), ({"deadline_s": 60.0}, 60.0)])
def test_a_tier_of_unknown_speed_is_waited_for_until_the_deadline_or_for_30_s(
    options: dict[str, float], seconds: float
) -> None:
    flights = Flights([Tier("new", LoadCost(), 1)], **options)
    load = Load(0, 0, 64, 0, True, 1000, began=1.0)
    flights.begin(load)
    assert flights.give_up_late(1.0 + seconds - 1e-3) == []
    assert flights.give_up_late(1.0 + seconds) == [load]
