"""Look-ahead placement: what waiting requests need is fetched in time, and spared; nobody is held up by that."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cakekv.store.base import Expected
from cakekv.store.disk import DiskStore
from cakekv.store.eviction import policy_named
from cakekv.store.memory import MemoryStore

from .chunks import SIZE, chunk_of, key_of
from .disk_folder import fill


def expected(name: str, *numbers: int, fetch: bool = True) -> Expected:
    return Expected(name, [key_of(number) for number in numbers], fetch)


def numbers_in(store: Any) -> set[int]:
    held = {chunk.key for chunk in store}
    return {number for number in range(100) if key_of(number) in held}


@pytest.fixture
def disk(folder: Path) -> DiskStore:
    store = DiskStore(folder)
    fill(store, *range(10))
    return store


def test_the_queue_is_fetched_in_its_order_as_far_as_there_is_room(tiered: Any, disk: DiskStore) -> None:
    memory = MemoryStore(4 * SIZE, policy_named("lookahead"))
    store = tiered((memory,), (disk,))
    fill(memory, 50, 51)
    store.expect([expected("a", 3, 4), expected("b", 4, 5), expected("c", 6, 7)])
    store.flush()
    assert numbers_in(memory) == {3, 4, 5, 6}
    store.expect([expected("c", 6, 7)])
    store.flush()
    assert {6, 7} <= numbers_in(memory)


def test_what_is_being_loaded_is_spared_and_not_fetched(tiered: Any, disk: DiskStore) -> None:
    memory = MemoryStore(3 * SIZE, policy_named("lookahead"))
    store = tiered((memory,), (disk,))
    fill(memory, 20)
    store.expect([expected("a", 1, 20, fetch=False)])
    store.flush()
    fill(memory, 50, 51, 52, 53)
    assert numbers_in(memory) == {20, 52, 53}


def test_an_announced_prompt_is_fetched_though_others_wait(tiered: Any, disk: DiskStore) -> None:
    memory = MemoryStore(8 * SIZE)
    store = tiered((memory,), (disk,))
    store.expect([expected("a", 1)])
    coming = store.prefetch(key_of("p"), [key_of(2), key_of(3), key_of(99)])
    assert coming == (2, 2 * SIZE, 0)
    store.expect([expected("b", 4)])
    store.flush()
    assert {2, 3, 4} <= numbers_in(memory)
    assert store.prefetch(key_of("p"), [key_of(2), key_of(3)]) == (0, 0, 2)


def test_pinned_chunks_stay_and_take_up_room(tiered: Any, disk: DiskStore) -> None:
    memory = MemoryStore(4 * SIZE)
    store = tiered((memory,), (disk,))
    fill(memory, 50, 51)
    memory.pin(key_of("p"), [key_of(50), key_of(51)], 60.0, SIZE)
    store.expect([expected("a", *range(8))])
    store.flush()
    assert numbers_in(memory) == {50, 51, 0, 1}


def test_what_is_deleted_meanwhile_does_not_come_back(tiered: Any, disk: DiskStore) -> None:
    gate = threading.Event()

    class Slow(MemoryStore):
        def open(self, key: Any) -> Any:
            reader = super().open(key)
            assert gate.wait(10)
            return reader

    memory, slow = MemoryStore(), Slow()
    fill(slow, 1, 2)
    store = tiered((memory,), (slow,))
    store.expect([expected("a", 1, 2)])
    store.delete([key_of(1)])
    gate.set()
    store.flush()
    assert numbers_in(memory) == {2}


def test_a_tier_that_hangs_holds_nobody_up(tiered: Any) -> None:
    gate = threading.Event()

    class Hanging(MemoryStore):
        def open(self, key: Any) -> Any:
            gate.wait(30)
            return super().open(key)

    memory, hanging = MemoryStore(), Hanging()
    fill(hanging, 1)
    store = tiered((memory,), (hanging,))
    began = time.monotonic()
    try:
        for _ in range(20):
            store.expect([expected("a", 1)])
        assert store.prefetch(key_of("p"), [key_of(1)]).chunks == 1
        fill(memory, 2)
        assert store.lookup([key_of(2)]) == [SIZE]
        store.close()
        assert time.monotonic() - began < 15
    finally:
        gate.set()


def test_a_tier_that_fails_is_passed_over(tiered: Any, disk: DiskStore, folder: Path) -> None:
    memory = MemoryStore()
    store = tiered((memory,), (disk,))
    for file in folder.glob("chunks/*/*.chunk"):
        file.write_bytes(b"damaged")
    store.expect([expected("a", 1, 2)])
    store.flush()
    assert store.write(key_of(60), chunk_of(60))


def test_alone_it_is_told_to_a_folder_too(folder: Path) -> None:
    store = DiskStore(folder, 4 * SIZE, policy_named("lookahead"))
    fill(store, 0, 1)
    store.expect([expected("a", 0)])
    fill(store, *range(20, 30))
    assert numbers_in(store) == {0, 27, 28, 29}
