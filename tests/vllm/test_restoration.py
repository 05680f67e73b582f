"""The stages of a restore within vLLM: what may follow what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cakekv.codec.raw import Raw
from cakekv.keys import ChunkKey
from cakekv.restore.contention import SharedLoad
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import LayerGroups, Level
from cakekv.restore.options import PlannerOptions
from cakekv.restore.stepwise import StepwisePlanner
from cakekv.vllm.messages import LoadResult
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks
from cakekv.vllm.scheduling.restoration import Restoration, Stage
from cakekv.vllm.scheduling.step_costs import SharedCost, StepCosts

BLOCK, CHUNKS = 16, 4
SUFFIX = 10


@pytest.fixture
def restoration() -> Restoration:
    """Of four stored chunks, each of a block; computing a token is so slow that all are to be loaded."""
    costs = StepCosts()
    costs.cost = ComputeCost(ComputeShape(0.0, 1.0, 0.0), trusted=True)
    cost, load_cost = SharedCost(costs), SharedLoad(LoadCost(1))
    prompt = CHUNKS * BLOCK + SUFFIX
    groups = LayerGroups((50_000_000, 50_000_000), (50_000_000, 50_000_000))
    planner = StepwisePlanner(
        prompt,
        BLOCK,
        [(0,)] * CHUNKS,
        [Tier("disk", load_cost, 1)],
        cost,
        [Level.whole(100_000_000, groups)],
        PlannerOptions(mode="load"),
        now=0.0,
    )
    request: Any = SimpleNamespace(request_id="r", num_tokens=prompt)
    keys = [ChunkKey(bytes([number]) * 32) for number in range(CHUNKS)]
    return Restoration(request, planner, cost, [load_cost], keys, range(CHUNKS), 0, LossyBlocks(Raw(), BLOCK))


def load(restoration: Restoration, number: int, now: float, reason: str = "") -> bool:
    """Order a load and have it end a tenth of a second later; False if none is wanted."""
    order = restoration.next_load(0, number, now, 0)
    if order is None:
        return False
    restoration.begun(number, now)
    size = restoration.load(number).size
    assert restoration.ended(number, 0, LoadResult(not reason, reason, size, 0.1, 0.0, False), 1, now + 0.1)
    return True


def test_loaded_to_the_end_and_computed(restoration: Restoration) -> None:
    assert restoration.parked
    now = 0.0
    for number in range(CHUNKS):
        assert load(restoration, number, now)
        now += 0.2
    assert restoration.joined
    restoration.begin_step(now)
    assert not restoration.demand.known
    restoration.decide(now, alone=False)
    assert restoration.demand == (SUFFIX, False, True)
    restoration.enter(Stage.PREFILLING)
    restoration.take(SUFFIX, 7, now)
    assert (restoration.stage, restoration.computed_by) == (Stage.COMPUTED, 7)
    restoration.begin_step(now + 1)
    assert restoration.planner.report().computed_tokens == SUFFIX
    for stage in Stage:
        with pytest.raises(AssertionError, match="is COMPUTED and cannot become"):
            restoration.enter(stage)


def test_nothing_is_computed_of_what_vllm_holds_to_be_loading(restoration: Restoration) -> None:
    for number in range(CHUNKS):
        load(restoration, number, 0.2 * number)
    with pytest.raises(AssertionError, match="r is PARKED and cannot become COMPUTED"):
        restoration.take(SUFFIX, 1, 1.0)


def test_a_chunk_that_failed_is_computed_before_the_suffix(restoration: Restoration) -> None:
    assert load(restoration, 0, 0.0, reason="store failed")
    assert restoration.failed_chunks == {CHUNKS - 1}  # the back is loaded first
    for number in range(1, CHUNKS):
        assert load(restoration, number, 0.2 * number)
    restoration.begin_step(1.0)
    restoration.decide(1.0, alone=False)
    restoration.enter(Stage.PREFILLING)
    assert restoration.position == (CHUNKS - 1) * BLOCK
    restoration.take(BLOCK, 1, 1.0)
    assert (restoration.stage, restoration.computed_by) == (Stage.PREFILLING, None)
    restoration.begin_step(2.0)
    restoration.decide(2.0, alone=False)
    restoration.take(SUFFIX, 2, 2.0)
    assert (restoration.stage, restoration.computed_by) == (Stage.COMPUTED, 2)
