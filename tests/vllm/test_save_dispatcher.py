"""Which chunks are handed over to be saved, and which are not."""

from __future__ import annotations

from collections.abc import Container

from cakekv.codec.raw import Raw
from cakekv.keys import ChunkKey
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks
from cakekv.vllm.scheduling.save_dispatcher import RequestChunks, SaveTracker

KEYS = [ChunkKey(bytes([number]) * 32) for number in range(4)]
NOTHING: list[tuple[int, ...]] = [()] * 4


def new_tracker(lossy: LossyBlocks | None = None) -> SaveTracker:
    """Chunks of two blocks of 16 tokens."""
    return SaveTracker(32, 16, lossy or LossyBlocks(Raw(), 16))


def saved(
    tracker: SaveTracker,
    end: int,
    stored: list[tuple[int, ...]] = NOTHING,
    again: Container[int] = (),
    asked_at: float = 0.0,
    now: float = 0.0,
    request: str = "r",
) -> list[int]:
    """Numbers of the chunks that are to be saved."""
    chunks = RequestChunks(KEYS, range(8), stored, asked_at, exact_from=3)
    orders = tracker.orders(request, end, chunks, again, now)
    assert all(order.exact == (order.start >= 96) for order in orders)
    assert all(order.block_ids == (order.start // 16, order.start // 16 + 1) for order in orders)
    return [order.start // 32 for order in orders]


def test_each_chunk_once_as_soon_as_it_is_complete() -> None:
    tracker = new_tracker()
    assert [tracker.due("r", end) for end in (31, 32)] == [False, True]
    assert saved(tracker, 31) == []
    assert saved(tracker, 70) == [0, 1]
    assert not tracker.due("r", 95)
    assert saved(tracker, 96) == [2]


def test_what_is_stored_is_saved_only_if_it_could_not_be_had() -> None:
    assert saved(new_tracker(), 128, stored=[(0,), (0,), (), ()], again={1}) == [1, 2, 3]


def test_two_requests_at_once_save_a_chunk_once() -> None:
    tracker = new_tracker()
    assert saved(tracker, 64) == [0, 1]
    assert saved(tracker, 96, request="twin", asked_at=1.0, now=2.0) == [2]


def test_an_evicted_chunk_is_saved_again() -> None:
    tracker = new_tracker()
    assert saved(tracker, 64) == [0, 1]
    assert saved(tracker, 64, request="later", asked_at=1000.0, now=1000.0) == [0, 1]


def test_what_a_worker_could_not_save_may_be_tried_again() -> None:
    tracker = new_tracker()
    assert saved(tracker, 64) == [0, 1]
    tracker.unsaved([KEYS[1]])
    assert saved(tracker, 64, request="twin", asked_at=1.0, now=2.0) == [1]
