"""Loads in flight: a tier that does not answer is found out, whether somebody waits for its loads or not."""

from __future__ import annotations

import pytest

from cakekv.restore.costs import LoadCost
from cakekv.restore.flights import Flights, Load, Tier

DEADLINE_S = 5.0


def flights(*, known: bool) -> Flights:
    cost = LoadCost(2)
    if known:
        cost.observe(1000, 0.0, 0.01)
    return Flights([Tier("disk", cost, 2)], deadline_s=DEADLINE_S)


def load(chunk: int, began: float = 1.0) -> Load:
    return Load(chunk, 16 * chunk, 16, 0, True, 1000, began)


@pytest.mark.parametrize("cancelled", [False, True], ids=["wanted", "cancelled"])
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_a_source_that_does_not_answer_is_stalled_after_the_deadline(known: bool, cancelled: bool) -> None:
    flying, loads = flights(known=known), [load(0), load(1)]
    for one in loads:
        flying.begin(one)
        if cancelled:
            flying.cancel(one)
    assert flying.give_up_late(2.0) == []
    assert not flying.stalled(0)
    assert set(flying.give_up_late(1.0 + DEADLINE_S)) == (set() if cancelled else set(loads))
    assert flying.stalled(0)
    assert flying.give_up_late(100.0) == [], "each is given up once"
    for one in loads:
        assert one.cancelled
        flying.answered(one, 0, 101.0)
    assert not flying.stalled(0)
    assert flying.has_room(0, 1000)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_one_load_that_hangs_stalls_a_source_unless_others_came_meanwhile(known: bool, moves: bool) -> None:
    flying = flights(known=known)
    flying.begin(load(0))
    if moves:
        flying.begin(other := load(1, began=1.1))
        flying.answered(other, 1000, 1.2)
        flying.land(other)
    flying.give_up_late(1.0 + DEADLINE_S)
    assert flying.stalled(0) is not moves


def test_no_more_loads_in_flight_than_keep_the_source_busy() -> None:
    cost = LoadCost(8)
    tier, size = Tier("link", cost, 8), 1000
    assert tier.useful_depth(size) == 1, "nothing is known yet"
    cost.observe(size, 0.0, 0.1, alone=True)
    assert tier.useful_depth(size) == 8, "nothing is known of several at a time"
    cost.observe(size, 0.0, 0.2)
    assert tier.useful_depth(size) == 2, "one load alone takes as long as each of many"
    for number in range(40):  # four at a time come as often as one would alone: there is latency to hide
        cost.observe(size, 0.125 + 0.025 * number, 0.225 + 0.025 * number)
    assert 5 <= tier.useful_depth(size) <= 6
    assert tier.useful_depth(10 * size) == tier.useful_depth(size)
    flying = Flights([tier], deadline_s=DEADLINE_S)
    for chunk in range(tier.useful_depth(size)):
        assert flying.has_room(0, size)
        flying.begin(load(chunk))
    assert not flying.has_room(0, size)
    assert flying.has_room(0, size, ahead=1), "who hands out loads ahead of time does not see when they end"
    flying.give_up_late(1.0 + DEADLINE_S)
    assert flying.has_room(0, size), "those that hang keep nothing busy"
