"""Tiered stores: what goes where, and that a tier in trouble is nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, MissingChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.member import FAILURES, Member
from cakekv.store.memory import MemoryStore
from cakekv.store.tiered import PROMOTIONS, TieredStore, TierPlan, Writing

from .chunks import SIZE, chunk_of, key_of, read
from .moody import OPERATIONS, Moody, eventually


def test_writing_through_back_and_never(tiered: Callable[..., Any]) -> None:
    stores = [MemoryStore() for _ in range(4)]
    writing = [Writing.THROUGH, Writing.THROUGH, Writing.BACK, Writing.NEVER]
    store = tiered(*zip(stores, writing, strict=True))
    assert store.write(key_of(0), chunk_of(0))
    assert [inner.stats().chunks for inner in stores[:2]] == [1, 1]
    store.flush()
    assert [inner.stats().chunks for inner in stores] == [1, 1, 1, 0]
    assert stores[2].lookup([key_of(0)]) == [SIZE]
    store.remember_identity(key_of(5).hex(), {"a": "b"})
    assert [len(inner.identities()) for inner in stores] == [1, 1, 1, 0]


def test_what_the_front_declines_goes_straight_to_the_back(tiered: Callable[..., Any]) -> None:
    front, back = MemoryStore(capacity=10), MemoryStore()
    store = tiered((front, Writing.THROUGH), (back, Writing.BACK))
    assert store.write(key_of(0), chunk_of(0))
    assert back.stats().chunks == 1


def test_a_tier_that_is_down_gets_its_copies_later(tiered: Callable[..., Any], member: Callable[..., Any]) -> None:
    front, back = MemoryStore(), Moody()
    slow = member(back, first_retry_s=0.01)
    store = tiered((front,), (slow, Writing.BACK))
    back.well.clear()
    with pytest.raises(StoreError):
        slow.lookup([key_of(0)])
    for number in range(3):
        assert store.write(key_of(number), chunk_of(number))
    back.well.set()
    eventually(lambda: back.stats().chunks == 3)
    assert store.uncopied == 0


def test_copies_that_cannot_be_made_are_counted(tiered: Callable[..., Any], member: Callable[..., Any]) -> None:
    front, back = MemoryStore(capacity=SIZE), Moody()
    slow = member(back)
    store = tiered((front,), (slow, Writing.BACK))
    back.well.clear()
    with pytest.raises(StoreError):
        slow.lookup([key_of(0)])
    for number in range(3):
        store.write(key_of(number), chunk_of(number))
    back.well.set()
    eventually(lambda: back.stats().chunks == 1)
    store.flush()
    assert store.uncopied == 2, "they were evicted before they could be copied"


def test_use_promotes_to_the_tiers_in_front_that_want_it(tiered: Callable[..., Any]) -> None:
    stores = [MemoryStore() for _ in range(4)]
    store = tiered(
        (stores[0],), (stores[1], Writing.THROUGH, False), (stores[2], Writing.NEVER), (stores[3], Writing.NEVER)
    )
    stores[2].write(key_of(0), chunk_of(0))
    assert len(store.tiers) == 4
    with store.tiers[2].open(key_of(0)) as reader:
        buffer = memoryview(bytearray(SIZE))
        for start in range(0, SIZE, 4096):
            reader.read_into(buffer[start : start + 4096], start)
    assert buffer == chunk_of(0)
    store.flush()
    assert [inner.stats().chunks for inner in stores] == [1, 0, 1, 0]
    assert read(stores[0], key_of(0)) == chunk_of(0)


def test_a_chunk_read_in_part_is_not_promoted(tiered: Callable[..., Any]) -> None:
    front, back = MemoryStore(), MemoryStore()
    store = tiered((front,), (back,))
    back.write(key_of(0), chunk_of(0))
    for pieces in ([(0, 4096)], [(4096, SIZE - 4096)], [(0, 4096), (8192, SIZE - 8192)]):
        with store.tiers[1].open(key_of(0)) as reader:
            for start, length in pieces:
                reader.read_into(memoryview(bytearray(length)), start)
    store.flush()
    assert front.stats().chunks == 0


def test_promotions_that_wait_are_bounded(tiered: Callable[..., Any], member: Callable[..., Any]) -> None:
    front, back = Moody(), MemoryStore()
    fast = member(front, deadline_s=60)
    store = tiered((fast,), (back,))
    for number in range(3 * PROMOTIONS):
        back.write(key_of(number), memoryview(bytes(100)))
    front.hangs = True
    front.well.clear()
    for number in range(3 * PROMOTIONS):
        read(store.tiers[1], key_of(number))
    front.well.set()
    store.flush()
    assert front.stats().chunks <= PROMOTIONS + 1


def test_a_copy_that_meets_an_outage_is_made_after_it(tiered: Callable[..., Any], member: Callable[..., Any]) -> None:
    front, back = MemoryStore(), Moody()
    store = tiered((front,), (member(back), Writing.BACK))
    back.well.clear()
    store.write(key_of(0), chunk_of(0))
    eventually(lambda: not store.members[1].is_up)
    assert back.asked.count("write") == FAILURES
    back.well.set()
    eventually(lambda: back.stats().chunks == 1)
    assert store.uncopied == 0


def test_a_copier_survives_what_is_no_stores_error(
    tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    front, back = MemoryStore(), MemoryStore()
    store = tiered((front,), (back, Writing.BACK))
    with monkeypatch.context() as patch:
        patch.setattr(back, "write", lambda key, data: 1 / 0)
        store.write(key_of(0), chunk_of(0))
        store.flush()
    assert store.uncopied == 1
    assert "could not be copied" in caplog.text
    store.write(key_of(1), chunk_of(1))
    store.flush()
    assert back.stats().chunks == 1


def test_damage_is_neither_promoted_nor_copied_and_is_overwritten(tiered: Callable[..., Any]) -> None:
    front, middle, back = MemoryStore(), MemoryStore(), MemoryStore()
    store = tiered((front,), (middle,), (back, Writing.BACK))
    damaged = chunk_of(0)
    damaged[5000] ^= 1
    back.write(key_of(0), damaged)
    read(store, key_of(0))
    store.flush()
    assert [inner.stats().chunks for inner in (front, middle)] == [0, 0]
    store.write(key_of(0), chunk_of(0))
    store.flush()
    assert read(back, key_of(0)) == chunk_of(0)


def test_what_is_deleted_is_not_promoted_any_more(tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    front, back, begun, go_on = MemoryStore(), MemoryStore(), threading.Event(), threading.Event()
    store = tiered((front,), (back,))
    write = front.write

    def waiting(key: ChunkKey, data: memoryview) -> Any:
        begun.set()
        go_on.wait(60)
        return write(key, data)

    monkeypatch.setattr(front, "write", waiting)
    for number in range(3):
        back.write(key_of(number), chunk_of(number))
        read(store.tiers[1], key_of(number))
    begun.wait(60)  # the first is being promoted
    store.delete([key_of(1)])
    go_on.set()
    store.flush()
    assert {chunk.key for chunk in front} == {key_of(0), key_of(2)}


def test_a_tier_in_trouble_is_nobody_elses(tiered: Callable[..., Any]) -> None:
    ill, well = Moody(name="ill"), MemoryStore()
    store = tiered((ill,), (well,))
    ill.well.clear()
    assert store.write(key_of(0), chunk_of(0))
    assert store.lookup([key_of(0), key_of(1)]) == [SIZE, None]
    assert read(store, key_of(0)) == chunk_of(0)
    assert store.stats() == StoreStats(1, SIZE, None)
    with pytest.raises(StoreError, match="may be left in the ill tier"):
        store.delete([key_of(0)])
    assert well.stats().chunks == 0
    with pytest.raises(MissingChunk if store.members[0].is_up else StoreError):
        store.open(key_of(0))


def test_if_all_are_in_trouble_it_says_so(tiered: Callable[..., Any]) -> None:
    ill = Moody(name="ill")
    store = tiered((ill,))
    ill.well.clear()
    with pytest.raises(StoreError):
        store.lookup([key_of(0)])
    for name in OPERATIONS.keys() - {"remember"}:
        with pytest.raises(StoreError):
            OPERATIONS[name](store)


def test_closing_finishes_the_copies(tmp_path: Path) -> None:
    front, back = MemoryStore(), DiskStore(tmp_path / "back")
    plan = [TierPlan(Member(lambda: front, "front")), TierPlan(Member(lambda: back, "back"), Writing.BACK)]
    with TieredStore(plan) as store:
        for number in range(20):
            store.write(key_of(number), chunk_of(number))
    assert DiskStore(tmp_path / "back").stats().chunks == 20


def test_nothing_to_write_through(member: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match="written through"):
        TieredStore([TierPlan(member(MemoryStore()), Writing.BACK)])
