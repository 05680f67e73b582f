"""Every fault happens as it is described, as often as asked for, and the same for the same seed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cakekv.errors import BadInput, MissingChunk, StoreError
from cakekv.store.faulty import FAULTS, FaultPlan, FaultyStore, parse_faults
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store

from .chunks import SIZE, chunk_of, key_of, part_of, read


def faulty(text: str, chunks: int = 1) -> FaultyStore:
    """A memory store with so many chunks, behind faults."""
    inner = MemoryStore()
    for number in range(chunks):
        inner.write(key_of(number), chunk_of(number))
    return FaultyStore(inner, parse_faults(text))


def test_without_faults_nothing_changes() -> None:
    store = FaultyStore(MemoryStore(), FaultPlan({}))
    assert store.write(key_of(0), chunk_of(0))
    assert store.lookup([key_of(0)]) == [SIZE]
    assert read(store, key_of(0)) == chunk_of(0)
    assert not store.injected


@pytest.mark.parametrize("operation", FAULTS["error"])
def test_an_error(operation: str) -> None:
    store = faulty(f"{operation}.error:1")
    operations = {
        "lookup": lambda: store.lookup([key_of(0)]),
        "open": lambda: store.open(key_of(0)),
        "read": lambda: read(store, key_of(0)),
        "write": lambda: store.write(key_of(0), chunk_of(0)),
    }
    with pytest.raises(StoreError, match=f"injected error of {operation}"):
        operations[operation]()
    assert store.injected == {(operation, "error"): 1}


def test_a_short_read() -> None:
    with faulty("short:1").open(key_of(0)) as reader:
        buffer = memoryview(bytearray(SIZE))
        assert reader.read_into(buffer, 0) == SIZE // 2
        assert buffer[: SIZE // 2] == chunk_of(0)[: SIZE // 2]


@pytest.mark.parametrize("operation", FAULTS["corrupt"])
def test_one_bit_is_flipped(operation: str) -> None:
    store = faulty(f"{operation}.corrupt:1")
    store.write(key_of(0), chunk_of(0))
    found, true = read(store, key_of(0)), bytes(chunk_of(0))
    differing = int.from_bytes(found, "big") ^ int.from_bytes(true, "big")
    assert differing.bit_count() == 1


@pytest.mark.parametrize("operation", FAULTS["vanish"])
def test_a_chunk_vanishes(operation: str) -> None:
    store = faulty(f"{operation}.vanish:1")
    assert store.lookup([key_of(0)]) == [SIZE]
    with pytest.raises(MissingChunk, match="vanish"):
        read(store, key_of(0))
    assert store.lookup([key_of(0)]) == [None]


def test_a_hang_lasts_until_the_store_is_closed() -> None:
    store = faulty("open.hang:1")
    ended = threading.Event()

    def hang() -> None:
        with pytest.raises(StoreError, match="hang of open is over"):
            store.open(key_of(0))
        ended.set()

    thread = threading.Thread(target=hang)
    thread.start()
    assert not ended.wait(0.05)
    store.close()
    thread.join(10)
    assert ended.is_set()


def test_a_hang_lasts_as_long_as_asked_for_and_slowness_passes() -> None:
    with pytest.raises(StoreError, match="over"):
        faulty("read.hang:1,hang_s:1ms").open(key_of(0)).read_into(memoryview(bytearray(8)), 0)
    store = faulty("slow:1,slow_s:1ms")
    assert read(store, key_of(0)) == chunk_of(0)
    assert store.injected == {("open", "slow"): 1, ("read", "slow"): 1}


def test_a_seed_tells_what_happens_whatever_the_order() -> None:
    def outcomes(seed: int, order: Any) -> Any:
        store = faulty(f"seed:{seed},open.error:0.3,open.vanish:0.2", chunks=50)
        found = {}
        for number in order:
            try:
                store.open(key_of(number))
                found[number] = "opened"
            except StoreError as error:
                found[number] = str(error)
        return found, store.injected

    forwards, injected = outcomes(7, range(50))
    assert outcomes(7, reversed(range(50))) == (forwards, injected)
    assert outcomes(8, range(50))[0] != forwards
    assert 5 <= injected["open", "error"] <= 25
    assert 2 <= injected["open", "vanish"] <= 20


def test_the_same_operation_again_draws_again() -> None:
    store = faulty("seed:1,open.error:0.5")
    outcomes = set()
    for _ in range(20):
        try:
            store.open(key_of(0))
            outcomes.add("opened")
        except StoreError:
            outcomes.add("failed")
    assert outcomes == {"opened", "failed"}


def test_a_plan_in_words() -> None:
    plan = parse_faults("seed:3,corrupt:0.25,open.hang:0.5,slow_s:20ms,hang_s:2s")
    assert plan == FaultPlan({("read", "corrupt"): 0.25, ("write", "corrupt"): 0.25, ("open", "hang"): 0.5}, 3, 0.02, 2)


@pytest.mark.parametrize("text", ["", "error", "boom:1", "open.short:1", "error:often", "seed:x", "slow_s:5", "hang:"])
def test_what_is_not_a_plan(text: str) -> None:
    with pytest.raises(BadInput, match=r"FAULT:PROBABILITY.*read\.corrupt"):
        parse_faults(text)


@pytest.mark.parametrize("text", ["open.error:0.6,open.hang:0.6", "error:-0.1", "error:nan"])
def test_probabilities(text: str) -> None:
    with pytest.raises(BadInput, match="from 0 to 1"):
        faulty(text)


def test_a_fault_of_another_operation() -> None:
    with pytest.raises(BadInput, match="no fault 'short' of 'write'"):
        FaultyStore(MemoryStore(), FaultPlan({("write", "short"): 0.5}))


def test_in_a_stores_url() -> None:
    store = open_store("memory://?faults=seed:1,open.error:1&latency=1us")
    part_of(store, FaultyStore)
    store.write(key_of(0), chunk_of(0))
    with pytest.raises(StoreError, match="injected"):
        store.open(key_of(0))
    with pytest.raises(BadInput, match=r"option 'faults' in .*: 'boom:1' is not a fault"):
        open_store("memory://?faults=boom:1")
