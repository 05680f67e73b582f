"""The laws of every eviction policy, in every tier that has one; then what each of them is for."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape
from cakekv.store.base import Expected, Store
from cakekv.store.disk import DiskStore
from cakekv.store.eviction import POLICIES, policy_named
from cakekv.store.eviction.base import Eviction, Held
from cakekv.store.eviction.keep_the_tail import KeepTheTail
from cakekv.store.eviction.sampled import SAMPLE
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.striped import StripedStore

from ..chunks import SIZE, chunk_of, key_of, part_of, read
from ..disk_folder import file_of

NOW = 1e9
TIERS: dict[str, Any] = {"memory": lambda folder, *options: MemoryStore(*options), "disk": DiskStore}

chunks_held = st.lists(
    st.builds(
        Held,
        st.integers(0, 10**6).map(key_of),
        st.integers(1, 10**8),
        st.floats(0, NOW),
        st.integers(0, 10**6),
        st.integers(1, 512),
    ),
    unique_by=lambda chunk: chunk.key,
    max_size=3 * SAMPLE,
)
events = st.lists(
    st.tuples(st.sampled_from(["wrote", "read", "removed", "asked", "evict"]), st.integers(0, 60)), max_size=400
)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Eviction:
    return policy_named(request.param)


@pytest.fixture(params=TIERS)
def open_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    return lambda *options: TIERS[request.param](tmp_path / "store", *options)


def held(number: int, used_ago: float = 0.0, *, size: int = 1, position: int = 0, tokens: int = 1) -> Any:
    return Held(key_of(number), size, NOW - used_ago, position, tokens)


def victims(policy: Any, now: Any = NOW) -> Any:
    """The numbers of all chunks, up to 1000, in the order in which they go."""
    numbers = {key_of(number): number for number in range(1000)}
    order = []
    while (chunk := policy.evict(now)) is not None:
        order.append(numbers[chunk.key])
    return order


def told(policy: Any, *chunks: Any) -> Any:
    for chunk in chunks:
        policy.wrote(chunk)
    return policy


def fill(store: Store, *numbers: int, position: Any = lambda number: 0) -> None:
    for number in numbers:
        assert store.write(key_of(number), chunk_of(number, position(number)))


# Laws


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=50)
@given(chunks=chunks_held)
def test_every_chunk_goes_once(name: str, chunks: Any) -> None:
    policy = told(policy_named(name), *chunks)
    assert len(policy) == len(chunks)
    gone = []
    while (chunk := policy.evict(NOW)) is not None:
        gone.append(chunk)
    assert {chunk.key for chunk in gone} == {chunk.key for chunk in chunks}
    assert len(gone) == len(chunks)
    assert len(policy) == 0


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=50)
@given(events=events)
def test_it_evicts_what_is_there_and_nothing_else(name: str, events: Any) -> None:
    """Whatever it is told, also of chunks it never heard of; and the same calls have the same effect."""
    policy, twin, there = policy_named(name), policy_named(name), set()
    for step, (event, number) in enumerate(events):
        now, key = NOW + step, key_of(number)
        for each in (policy, twin):
            if event == "wrote":
                each.wrote(Held(key, 1 + number, now, 512 * number, 512))
            elif event == "read":
                each.read(key, now)
            elif event == "removed":
                each.removed(key)
            elif event == "asked":
                each.asked([key_of(other) for other in range(number)], now)
        if event == "wrote":
            there.add(key)
        elif event == "removed":
            there.discard(key)
        elif event == "evict":
            victim = policy.evict(now)
            other = twin.evict(now)
            assert (victim is None) == (not there)
            if victim is not None:
                assert other is not None
                assert victim.key == other.key
                there.remove(victim.key)
        assert {chunk.key for chunk in policy.chunks()} == there


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=50)
@given(chunks=chunks_held.filter(len), later=st.floats(0, 1e6))
def test_of_two_chunks_that_differ_in_their_last_use_only_the_older_goes_first(
    name: str, chunks: Any, later: Any
) -> None:
    chunks = chunks[: SAMPLE - 1]
    twin = Held(key_of(-1), chunks[0].size, max(0, chunks[0].used_at - 1 - later), chunks[0].position, chunks[0].tokens)
    if twin.used_at < chunks[0].used_at:
        policy = told(policy_named(name), twin, *chunks)
        order = []
        while (chunk := policy.evict(NOW)) is not None:
            order.append(chunk)
        assert order.index(twin) < order.index(chunks[0])


@pytest.mark.parametrize("name", POLICIES)
def test_an_eviction_costs_no_more_among_many_chunks(name: str) -> None:
    def calls(chunks: Any) -> Any:
        policy = told(policy_named(name), *(held(number, chunks - number) for number in range(chunks)))
        made = [0]

        def count(frame: Any, event: Any, argument: Any) -> None:
            made[0] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            for number in range(500):
                policy.read(key_of(number + 100), NOW)
                policy.evict(NOW)
                policy.wrote(held(chunks + number))
        finally:
            sys.setprofile(None)
        return made[0]

    assert calls(8000) < 1.5 * calls(1000)


def test_the_capacity_is_kept_and_used(policy: Eviction, open_tier: Callable[..., Any]) -> None:
    store = open_tier(8 * SIZE, policy)
    choose = random.Random(5)
    for step in range(100):
        number = choose.randrange(20)
        if choose.random() < 0.7:
            fill(store, number)
        elif store.lookup([key_of(number)])[0]:
            assert read(store, key_of(number)) == chunk_of(number)
        assert store.stats().bytes <= 8 * SIZE
        if step > 50:
            assert store.stats().chunks >= 6, "more was evicted than had to be"
    assert store.stats().bytes == sum(chunk.size for chunk in store)


def test_what_was_just_written_is_there(policy: Eviction, open_tier: Callable[..., Any]) -> None:
    store = open_tier(4 * SIZE, policy)
    for number in range(30):
        fill(store, number)
        assert store.lookup([key_of(number)]) == [SIZE]


def test_what_is_being_read_is_read_to_its_end(policy: Eviction, open_tier: Callable[..., Any]) -> None:
    store = open_tier(4 * SIZE, policy)
    fill(store, 0)
    with store.open(key_of(0)) as reader:
        start = memoryview(bytearray(100))
        reader.read_into(start, 0)
        fill(store, *range(1, 100))
        rest = memoryview(bytearray(SIZE - 100))
        assert reader.read_into(rest, 100) == SIZE - 100
    assert bytes(start) + bytes(rest) == chunk_of(0)


def test_what_is_not_used_goes_in_the_end(
    policy: Eviction, open_tier: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However dear it is."""
    now = [NOW]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(now[0] * 1e9))
    store = open_tier(4 * SIZE, policy)
    store.write(key_of(0), chunk_of(0, position=100_000))
    for _ in range(5):
        store.open(key_of(0)).close()
    for number in range(1, 200):
        now[0] += 10
        fill(store, number)
        if store.lookup([key_of(0)]) == [None]:
            return
        store.open(key_of(number)).close()
    raise AssertionError("it stayed for ever")


# What each is for


def test_lru_goes_by_use_alone() -> None:
    policy = told(policy_named("lru"), held(0, 10, position=10**6), held(1, 9, size=10**9), held(2, 8))
    policy.read(key_of(1), NOW - 1)
    assert victims(policy) == [0, 2, 1]


def test_lru_takes_chunks_in_any_order() -> None:
    policy = told(policy_named("lru"), *(held(number, used_ago) for number, used_ago in enumerate([3, 1, 2, 5, 4])))
    assert victims(policy) == [3, 4, 0, 2, 1]


def test_lru_does_not_grow_with_what_was_removed() -> None:
    policy: Any = policy_named("lru")
    for number in range(2000):
        policy.wrote(held(number % 7))
    assert len(policy._heap) < 200


def test_lfu_keeps_what_is_popular_until_it_is_not() -> None:
    def after(seconds: float) -> Any:
        policy = told(policy_named("lfu"), held(0, 100), held(1, 50))
        for _ in range(20):
            policy.read(key_of(0), NOW - 100)
        policy.read(key_of(1), NOW + seconds - 50)
        return victims(policy, NOW + seconds)

    assert after(0) == [1, 0]
    assert after(100_000) == [0, 1]


def test_lfu_counts_uses(open_tier: Callable[..., Any]) -> None:
    store = open_tier(4 * SIZE, policy_named("lfu"))
    fill(store, 0, 1, 2, 3)
    for _ in range(50):
        store.open(key_of(0)).close()
    fill(store, *range(4, 9))
    assert store.lookup([key_of(0)]) == [SIZE]


def test_s3fifo_by_hand() -> None:
    policy = told(policy_named("s3fifo"), *(held(number) for number in range(10)))
    for number in (0, 3, 3):
        policy.read(key_of(number), NOW)

    def gone() -> Any:
        chunk = policy.evict(NOW)
        return next(number for number in range(100) if key_of(number) == chunk.key)

    # 0 was read, so it moves to the main queue; 1 and 2 were not; then 3 moves, and 4 goes.
    assert [gone() for _ in range(3)] == [1, 2, 4]
    policy.wrote(held(1))  # it is remembered: to the main queue at once
    policy.wrote(held(90))
    assert [gone() for _ in range(5)] == [5, 6, 7, 8, 9]
    # The small queue, of 90 alone, still has more than a tenth of the bytes; then the main queue, in its order.
    assert [gone() for _ in range(4)] == [90, 0, 3, 1]
    assert policy.evict(NOW) is None


def test_s3fifo_goes_round_for_what_is_read() -> None:
    policy = told(policy_named("s3fifo"), held(0), held(1), held(2))
    for number in (0, 1):
        policy.read(key_of(number), NOW)
    assert policy.evict(NOW).key == key_of(2)
    for _ in range(9):
        policy.read(key_of(0), NOW)
    assert victims(policy) == [1, 0]


def test_heads_go_before_tails(open_tier: Callable[..., Any]) -> None:
    """A prompt's chunks are written from its beginning, and its end is what stays."""
    store = open_tier(8 * SIZE, KeepTheTail())
    fill(store, *range(8), position=lambda number: number * 4096)
    fill(store, 100, 101, 102)
    assert store.lookup([key_of(number) for number in (0, 7)]) == [None, SIZE]
    kept = [number for number in range(8) if store.lookup([key_of(number)])[0]]
    assert kept == list(range(8 - len(kept), 8))


def test_heads_go_before_tails_even_if_they_are_used_later(open_tier: Callable[..., Any]) -> None:
    store = open_tier(2 * SIZE, KeepTheTail())
    fill(store, 1, position=lambda number: 100_000)
    fill(store, 0)
    store.open(key_of(0)).close()
    fill(store, 2)
    assert store.lookup([key_of(1), key_of(0)]) == [SIZE, None]


def test_the_price_is_that_of_the_cost_model() -> None:
    head = held(0, size=1000, tokens=64)
    tail = held(1, size=1000, tokens=64, position=8192)
    flat = KeepTheTail(ComputeShape(1.0, 1e-3, 0.0))
    assert flat.saved_s_per_byte(head) == flat.saved_s_per_byte(tail) == pytest.approx(64e-6)
    assert flat.saved_s_per_byte(held(2, size=2000, tokens=64)) == pytest.approx(32e-6)
    steep = KeepTheTail(ComputeShape(1.0, 1e-3, 1e-6))
    assert steep.saved_s_per_byte(tail) - steep.saved_s_per_byte(head) == pytest.approx(64 * 8192e-9)


def test_policies_by_url(tmp_path: Path) -> None:
    store = part_of(open_store("memory://?capacity=1MB&evict=keep_the_tail"), MemoryStore)
    assert isinstance(store.policy, KeepTheTail)
    with open_store(f"file://{tmp_path}/store?capacity=1MB&evict=keep_the_tail&stripe={tmp_path}/more") as opened:
        parts: Any = part_of(opened, StripedStore)._stores
        one, other = (part._policy for part in parts)
        assert isinstance(one, KeepTheTail)
        assert isinstance(other, KeepTheTail)
        assert one is not other
    with pytest.raises(BadInput, match=f"there are {', '.join(sorted(POLICIES))}"):
        open_store("memory://?evict=unheard_of")


# A clock that was ahead


def test_chunks_used_while_the_clock_was_ahead_are_not_kept_for_that(policy: Eviction) -> None:
    for number in range(40):
        policy.wrote(held(number, -1e8 if number < 20 else 0.0))
    for number in range(10):
        policy.read(key_of(number), NOW + 1e8)
    policy.asked([key_of(number) for number in range(20)], NOW + 1e8)
    first = [policy.evict(NOW + second) for second in range(1, 6)]
    assert None not in first
    for round_ in range(1, 30):  # those written since are read again and again
        for number in range(20, 40):
            policy.read(key_of(number), NOW + 600.0 * round_)
    now = NOW + 600.0 * 30
    gone = {policy.evict(now).key for _ in range(15)}
    ahead = {key_of(number) for number in range(20)}
    assert len(gone & ahead) >= 10, "what nobody reads any more goes first"


@pytest.mark.parametrize("evict", ["lru", "keep_the_tail", "lfu"])
def test_a_tier_whose_clock_was_ahead(
    evict: str, open_tier: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ahead = time.time, [1e8]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + ahead[0]) * 1e9))
    store = open_tier(10 * SIZE, policy_named(evict))
    for number in range(10):
        store.write(key_of(number), chunk_of(number))
    for number in range(10, 15):
        ahead[0] = 60.0 * (number - 10)
        store.write(key_of(number), chunk_of(number))
    for round_ in range(1, 20):
        ahead[0] = 600.0 * round_
        for number in range(10, 15):
            if store.lookup([key_of(number)])[0] is not None:
                store.open(key_of(number)).close()
    for number in range(20, 26):
        store.write(key_of(number), chunk_of(number))
    left = {chunk.key for chunk in store}
    assert not left & {key_of(number) for number in range(10)}, "all that was written ahead of time has gone by now"


def test_a_folder_with_chunks_dated_in_the_future(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with DiskStore(folder) as store:
        for number in range(6):
            store.write(key_of(number), chunk_of(number))
        for number in range(3):
            os.utime(file_of(folder, number), (4e9, 4e9))
    with DiskStore(folder, 6 * SIZE) as store:
        store.write(key_of(10), chunk_of(10))  # finds them
        for number in (*range(3, 6), 10):
            if store.lookup([key_of(number)])[0] is not None:
                store.open(key_of(number)).close()
        for number in range(11, 14):
            store.write(key_of(number), chunk_of(number))
        left = {chunk.key for chunk in store}
        assert not left & {key_of(number) for number in range(3)}


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=50)
@given(chunks=chunks_held, spared=st.sets(st.integers(0, 200)), again=st.sets(st.integers(0, 200)))
def test_what_is_spared_does_not_go(name: str, chunks: Any, spared: Any, again: Any) -> None:
    """Until it is spared no more; all else goes, and what is read or removed meanwhile is known."""
    keys = [chunk.key for chunk in chunks]
    kept = frozenset(keys[number] for number in spared if number < len(keys))
    policy = told(policy_named(name), *chunks)
    policy.spare(kept)
    gone = set()
    while (chunk := policy.evict(NOW)) is not None:
        gone.add(chunk.key)
    assert gone == set(keys) - kept
    assert {chunk.key for chunk in policy.chunks()} == kept
    assert not policy.may_evict
    policy.asked(keys, NOW)
    for key in kept:
        policy.read(key, NOW + 1)
    removed = frozenset(keys[number] for number in again if number < len(keys))
    for key in removed:
        policy.removed(key)
    policy.spare(frozenset())
    gone = set()
    while (chunk := policy.evict(NOW)) is not None:
        gone.add(chunk.key)
    assert gone == kept - removed


def test_fifo_goes_by_the_time_of_writing() -> None:
    policy = told(policy_named("fifo"), held(1), held(2), held(3))
    policy.read(key_of(1), NOW)
    policy.wrote(held(2))
    assert victims(policy) == [1, 3, 2]


def test_lookahead_spares_the_queue_and_lets_the_last_in_it_go_first() -> None:
    policy = told(policy_named("lookahead"), *(held(number, 100 - number) for number in range(8)))
    policy.expect([Expected("a", [key_of(0), key_of(1)]), Expected("b", [key_of(1), key_of(2)]), Expected("c", [])])
    assert [policy.evict(NOW).key for _ in range(6)] == [key_of(number) for number in (3, 4, 5, 6, 7, 2)]
    policy.expect([Expected("b", [key_of(1)])])
    assert victims(policy) == [0, 1]


@settings(deadline=None, max_examples=50)
@given(events=events, waiting=st.lists(st.lists(st.integers(0, 60), max_size=8), max_size=5))
def test_lookahead_never_lets_go_what_is_needed_sooner(events: Any, waiting: Any) -> None:
    policy = policy_named("lookahead")
    turns: dict[Any, int] = {}
    for step, (event, number) in enumerate(events):
        now, key = NOW + step, key_of(number)
        if event == "wrote":
            policy.wrote(Held(key, 1, now))
        elif event == "read":
            policy.read(key, now)
        elif event == "removed":
            policy.removed(key)
        elif event == "asked":
            queue = waiting[number % 5 :]
            policy.expect([Expected(turn, [key_of(other) for other in one]) for turn, one in enumerate(queue)])
            turns = {key_of(other): turn for turn, one in reversed(list(enumerate(queue))) for other in one}
        else:
            turn = max((turns.get(chunk.key, 1000) for chunk in policy.chunks()), default=None)
            victim = policy.evict(now)
            assert (victim is None) == (turn is None)
            if victim is not None:
                assert turns.get(victim.key, 1000) == turn
