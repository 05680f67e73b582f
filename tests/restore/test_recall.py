"""Whether, and from where on, a prefix is read as queries ask for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.recall import RecallShape, Spread, by_promise, recalled_from

TOKENS, PREFIX, CHUNK = 4128, 4096, 64
PER_TOKEN = 1000
SHAPE = RecallShape(range(0, PREFIX + 1, 512), PER_TOKEN, 30, 60, 0.2, 28)
COMPUTE_S = 4.0


def compute() -> ComputeCost:
    return ComputeCost(ComputeShape(0.0, COMPUTE_S / PREFIX, 0.0), trusted=True)


def load(seconds: float, latency_s: float = 0.0) -> LoadCost:
    """Of a tier from which the whole prefix comes in so many seconds."""
    cost = LoadCost()
    for number in range(20):
        size = PER_TOKEN * CHUNK * (1 + number % 2)
        began = float(100 * number)
        cost.observe(size, began, began + latency_s + size * seconds / (PER_TOKEN * PREFIX), alone=True)
    return cost


def start(cost: LoadCost, shape: RecallShape = SHAPE) -> int | None:
    return recalled_from(shape, TOKENS, PREFIX, compute(), cost, PER_TOKEN * CHUNK, CHUNK)


def test_at_balance_hardly_anything_is_computed() -> None:
    front = start(load(COMPUTE_S))
    assert front is not None
    assert front <= 512


def test_a_front_is_computed_only_where_that_gains_clearly() -> None:
    """Not where it is expected to be a little sooner: computing takes cores from what reads."""
    gains: dict[bool, list[float]] = {True: [], False: []}
    for ratio in (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0):
        cost = load(ratio * COMPUTE_S)
        front = start(cost)
        if front is not None:
            seconds = [SHAPE.seconds(one, TOKENS, compute(), cost) for one in SHAPE.ends[:-1]]
            gains[front > 0].append(seconds[0] / min(seconds))
    assert 1.0 < max(gains[False]) < 1.15 <= min(gains[True])


def test_where_loading_is_far_slower_all_is_computed() -> None:
    assert start(load(100 * COMPUTE_S)) is None


def test_where_every_read_takes_long_all_is_read_at_once() -> None:
    assert start(load(0.1 * COMPUTE_S)) is not None
    assert start(load(0.1 * COMPUTE_S, latency_s=1.0)) is None


def test_nothing_known_is_learned_first() -> None:
    assert start(LoadCost()) is None
    unknown = recalled_from(SHAPE, TOKENS, PREFIX, ComputeCost(), load(1.0), PER_TOKEN * CHUNK, CHUNK)
    assert unknown is None


def test_who_selects_everything_gains_nothing() -> None:
    everything = RecallShape(SHAPE.ends, PER_TOKEN, 30, 60, 1.0, 28)
    assert start(load(COMPUTE_S), everything) in (None, PREFIX)


@given(st.floats(0.01, 100.0), st.floats(0.01, 1.0))
def test_it_is_never_expected_to_be_slower(ratio: float, share: float) -> None:
    shape = RecallShape(SHAPE.ends, PER_TOKEN, 30, 60, share, 28)
    cost = load(ratio * COMPUTE_S)
    front = start(cost, shape)
    if front is not None:
        assert front in shape.ends[:-1]
        both = compute().seconds(0, PREFIX) * cost.seconds(PER_TOKEN * PREFIX)
        whole = both / (compute().seconds(0, PREFIX) + cost.seconds(PER_TOKEN * PREFIX))
        assert shape.seconds(front, TOKENS, compute(), cost) < whole * 1.2 + 0.2


def test_what_promises_most_is_read_first() -> None:
    assert by_promise({"a": [7, 3], "b": [], "c": [2, 9], "d": [0]}) == ["d", "c", "a", "b"]


def test_what_suffixes_select_is_learned() -> None:
    spread = Spread()
    assert spread.share(PREFIX, PREFIX) == 1.0
    for _ in range(30):
        spread.observe(0.1, 256, PREFIX)
    assert abs(spread.share(256, PREFIX) - 0.1) < 0.01
    assert abs(spread.share(512, PREFIX) - 0.2) < 0.02
