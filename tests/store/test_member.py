"""One tier of a tiered store: when it is down, who notices, and when it is asked again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cakekv.errors import MissingChunk, NoAnswer, StoreError, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader
from cakekv.store.member import FAILURES, Member
from cakekv.store.memory import MemoryStore

from .chunks import SIZE, chunk_of, key_of, read
from .moody import OPERATIONS, Moody, eventually


def test_a_failing_look_up_takes_a_tier_down_until_it_is_well_again(member: Callable[..., Any]) -> None:
    store = Moody()
    tier = member(store, first_retry_s=0.01)
    store.well.clear()
    with pytest.raises(StoreError, match="not in the mood"):
        tier.lookup([key_of(0)])
    for operation in OPERATIONS.values():
        with pytest.raises(StoreError, match=r"the moody tier is down.*not in the mood"):
            operation(tier)
    store.well.set()
    eventually(lambda: tier.is_up)
    assert tier.write(key_of(0), chunk_of(0))
    assert read(tier, key_of(0)) == chunk_of(0)


def test_a_down_tier_is_not_asked_by_requests(member: Callable[..., Any]) -> None:
    store = Moody()
    tier = member(store, first_retry_s=1000)
    store.well.clear()
    with pytest.raises(StoreError):
        tier.lookup([key_of(0)])
    asked = len(store.asked)
    for operation in OPERATIONS.values():
        with pytest.raises(StoreError):
            operation(tier)
    assert len(store.asked) == asked


def test_pauses_get_longer(member: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    class Clock(threading.Event):
        def wait(self, timeout: Any = None) -> Any:
            pauses.append(timeout)
            return len(pauses) > 9 or super().wait(0)

    store = Moody()
    tier = member(store, first_retry_s=1.0)
    tier._closed = Clock()
    store.well.clear()
    with pytest.raises(StoreError):
        tier.lookup([key_of(0)])
    eventually(lambda: len(pauses) > 9)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_a_look_up_that_hangs_is_not_waited_for(member: Callable[..., Any]) -> None:
    store = Moody()
    tier = member(store, deadline_s=0.05)
    store.hangs = True
    store.well.clear()
    with pytest.raises(StoreError, match=r"no answer within 0\.05 s"):
        tier.lookup([key_of(0)])
    assert not tier.is_up
    store.well.set()
    eventually(lambda: tier.is_up)


def test_one_failure_of_another_kind_is_not_the_end(member: Callable[..., Any]) -> None:
    store = Moody()
    tier = member(store, first_retry_s=1000)
    for number in range(3 * FAILURES):
        store.well.clear() if number % FAILURES else store.well.set()
        if number % FAILURES:
            with pytest.raises(StoreError, match="not in the mood"):
                tier.write(key_of(0), chunk_of(0))
        else:
            tier.write(key_of(0), chunk_of(0))
    assert tier.is_up
    for _ in range(FAILURES):
        with pytest.raises(StoreError):
            tier.write(key_of(0), chunk_of(0))
    assert not tier.is_up


def test_a_step_without_io_is_no_sign_of_health(member: Callable[..., Any]) -> None:
    class Unreadable(MemoryStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            reader = super().open(key)
            reader.read_into = lambda buffer, offset: (_ for _ in ()).throw(StoreError("no reading"))
            return reader

    store = Unreadable()
    store.write(key_of(0), chunk_of(0))
    tier = member(store, first_retry_s=1000)
    for _ in range(FAILURES):
        assert tier.lookup([key_of(0)]) == [SIZE]
        with pytest.raises(StoreError, match="no reading"):
            read(tier, key_of(0))
        tier._inner.write(key_of(0), chunk_of(0))
    assert not tier.is_up


def test_no_answer_takes_a_tier_down_at_once_unless_others_got_one(member: Callable[..., Any]) -> None:
    class Silent(MemoryStore):
        others = False

        def write(self, key: ChunkKey, data: memoryview) -> bool:
            if self.others:
                tier.lookup([key_of(0)])
            raise NoAnswer("silence")

    store = Silent()
    tier = member(store, first_retry_s=1000)
    store.others = True
    with pytest.raises(NoAnswer):
        tier.write(key_of(0), chunk_of(0))
    assert tier.is_up
    store.others = False
    with pytest.raises(NoAnswer):
        tier.write(key_of(0), chunk_of(0))
    assert not tier.is_up


def test_a_tier_that_only_answers_look_ups_is_asked_less_and_less(member: Callable[..., Any]) -> None:
    class Unwritable(MemoryStore):
        def write(self, key: ChunkKey, data: memoryview) -> bool:
            raise NoAnswer("silence")

    tier = member(Unwritable(), first_retry_s=0.2)
    pauses = []
    for _ in range(4):
        with pytest.raises(NoAnswer):
            tier.write(key_of(0), chunk_of(0))
        pauses.append(tier.retry_s)
        eventually(lambda: tier.is_up)
    assert pauses == [0.2, 0.4, 0.8, 1.6]


def test_a_look_up_that_is_late_while_others_are_answered_takes_nothing_down(member: Callable[..., Any]) -> None:
    go_on = threading.Event()

    class Busy(MemoryStore):
        def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
            if len(keys) > 1:
                go_on.wait(60)
            return super().lookup(keys)

    tier = member(Busy(), deadline_s=0.5, first_retry_s=1000)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(tier.lookup, [key_of(0), key_of(1)])
        while not long.done():
            assert tier.lookup([key_of(0)]) == [None]
        with pytest.raises(NoAnswer):
            long.result()
    assert tier.is_up
    go_on.set()


def test_missing_chunks_are_no_failures(member: Callable[..., Any]) -> None:
    tier = member(MemoryStore())
    for _ in range(5 * FAILURES):
        with pytest.raises(MissingChunk):
            tier.open(key_of(0))
    assert tier.is_up


def test_chunks_sealed_with_an_unknown_key_are_no_trouble_of_the_tier(member: Callable[..., Any]) -> None:
    def foreign(key: ChunkKey) -> ChunkReader:
        raise UnknownKey("sealed with a key that is not in the keyring")

    sealed = MemoryStore()
    tier = member(sealed)
    sealed.open = foreign
    for _ in range(2 * FAILURES):
        with pytest.raises(UnknownKey):
            tier.open(key_of(0))
    assert tier.is_up


def test_a_tier_that_cannot_be_opened_is_opened_later(request: pytest.FixtureRequest) -> None:
    well = threading.Event()

    def opened() -> Any:
        if not well.is_set():
            raise StoreError("nobody there")
        return MemoryStore()

    tier = Member(opened, "redis", first_retry_s=0.01)
    request.addfinalizer(tier.close)
    with pytest.raises(StoreError, match=r"the redis tier is down.*nobody there"):
        tier.lookup([key_of(0)])
    well.set()
    eventually(lambda: tier.is_up)
    assert tier.lookup([key_of(0)]) == [None]
    assert tier.name == "memory"


# Several
