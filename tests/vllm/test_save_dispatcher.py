"""Which chunks are handed over to be saved, and which are not."""

from __future__ import annotations

from collections.abc import Container

from cakekv.codec.raw import Raw
from cakekv.keys import ChunkKey
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks
from cakekv.vllm.scheduling.save_dispatcher import SaveTracker

KEYS = [ChunkKey(bytes([number]) * 32) for number in range(4)]
NOTHING: list[tuple[int, ...]] = [()] * 4


def new_plan(lossy: LossyBlocks | None = None) -> SaveTracker:
    """Chunks of two blocks of 16 tokens."""
    return SaveTracker(32, 16, lossy or LossyBlocks(Raw(), 16))


def saved(
    plan: SaveTracker,
    end: int,
    stored: list[tuple[int, ...]] = NOTHING,
    again: Container[int] = (),
    asked_at: float = 0.0,
    now: float = 0.0,
    request: str = "r",
) -> list[int]:
    """Numbers of the chunks that are to be saved."""
    orders = plan.orders(request, end, KEYS, list(range(8)), stored, again, 3, asked_at, now)
    assert all(order.exact == (order.start >= 96) for order in orders)
    assert all(order.block_ids == (order.start // 16, order.start // 16 + 1) for order in orders)
    return [order.start // 32 for order in orders]


def test_each_chunk_once_as_soon_as_it_is_complete() -> None:
    plan = new_plan()
    assert [plan.due("r", end) for end in (31, 32)] == [False, True]
    assert saved(plan, 31) == []
    assert saved(plan, 70) == [0, 1]
    assert not plan.due("r", 95)
    assert saved(plan, 96) == [2]


def test_what_is_stored_is_saved_only_if_it_could_not_be_had() -> None:
    assert saved(new_plan(), 128, stored=[(0,), (0,), (), ()], again={1}) == [1, 2, 3]


def test_two_requests_at_once_save_a_chunk_once() -> None:
    plan = new_plan()
    assert saved(plan, 64) == [0, 1]
    assert saved(plan, 96, request="twin", asked_at=1.0, now=2.0) == [2]


def test_an_evicted_chunk_is_saved_again() -> None:
    plan = new_plan()
    assert saved(plan, 64) == [0, 1]
    assert saved(plan, 64, request="later", asked_at=1000.0, now=1000.0) == [0, 1]


def test_what_a_worker_could_not_save_may_be_tried_again() -> None:
    plan = new_plan()
    assert saved(plan, 64) == [0, 1]
    plan.unsaved([KEYS[1]])
    assert saved(plan, 64, request="twin", asked_at=1.0, now=2.0) == [1]
