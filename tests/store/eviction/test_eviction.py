"""The laws of every eviction policy, in every tier that has one; then what each of them is for."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.chunk import peek_place
from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape
from cakekv.store.disk import DiskStore
from cakekv.store.eviction import POLICIES, policy_named
from cakekv.store.eviction.base import Candidate, Victims
from cakekv.store.eviction.keep_the_tail import KeepTheTail
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.tail_only import TailOnlyStore

from ..chunks import SHAPE, SIZE, chunk_of, key_of, read

NOW = 1e9
TIERS = {"memory": lambda folder, *options: MemoryStore(*options), "disk": DiskStore}

candidates = st.lists(
    st.builds(
        Candidate,
        st.integers(0, 10**6).map(key_of),
        st.integers(1, 10**8),
        st.floats(0, NOW),
        st.integers(0, 100),
        st.integers(0, 10**6),
        st.integers(1, 512),
    ),
    unique_by=lambda candidate: candidate.key,
    max_size=40,
)


@pytest.fixture(params=POLICIES)
def policy(request):
    return policy_named(request.param)


@pytest.fixture(params=TIERS)
def open_tier(request, tmp_path):
    return lambda *options: TIERS[request.param](tmp_path / "store", *options)


def ordered(policy, *chunks):
    return [candidate.key for candidate in policy.order(chunks, NOW)]


def fill(store, *numbers, position=lambda number: 0):
    for number in numbers:
        assert store.write(key_of(number), chunk_of(number, position(number)))


# Laws


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(chunks=candidates)
def test_an_order_names_every_candidate_once_whatever_their_order(name, chunks):
    policy = policy_named(name)
    result = policy.order(iter(chunks), NOW)
    assert sorted(result) == sorted(chunks)
    for other in (chunks[::-1], random.Random(1).sample(chunks, len(chunks))):
        if len({candidate.used_at for candidate in chunks}) == len(chunks):
            assert policy.order(other, NOW) == result


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(chunks=candidates.filter(len), later=st.floats(0, 1e6))
def test_of_two_chunks_that_differ_in_their_last_use_only_the_older_goes_first(name, chunks, later):
    twin = chunks[0]._replace(key=key_of(-1), used_at=max(0, chunks[0].used_at - 1 - later))
    order = policy_named(name).order([*chunks, twin], NOW)
    if twin.used_at < chunks[0].used_at:
        assert order.index(twin) < order.index(chunks[0])


def test_the_capacity_is_kept_and_used(policy, open_tier):
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


def test_what_was_just_written_is_there(policy, open_tier):
    store = open_tier(4 * SIZE, policy)
    for number in range(30):
        fill(store, number)
        assert store.lookup([key_of(number)]) == [SIZE]


def test_what_is_not_used_goes_in_the_end(policy, open_tier, monkeypatch):
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


def test_lru_goes_by_use_alone():
    old = Candidate(key_of(0), 1, NOW - 10, 100, 10**6)
    new = Candidate(key_of(1), 10**9, NOW - 9)
    assert ordered(policy_named("lru"), new, old) == [old.key, new.key]


def test_lfu_keeps_what_is_popular_until_it_is_not():
    popular = Candidate(key_of(0), 1, NOW - 100, uses=20)
    recent = Candidate(key_of(1), 1, NOW - 50, uses=0)
    forgotten = popular._replace(key=key_of(2), used_at=NOW - 100_000)
    assert ordered(policy_named("lfu"), popular, recent) == [recent.key, popular.key]
    assert ordered(policy_named("lfu"), forgotten, popular, recent)[0] == forgotten.key


def test_lfu_counts_uses(open_tier):
    store = open_tier(4 * SIZE, policy_named("lfu"))
    fill(store, 0, 1, 2, 3)
    for _ in range(50):
        store.open(key_of(0)).close()
    fill(store, *range(4, 9))
    assert store.lookup([key_of(0)]) == [SIZE]


def test_heads_go_before_tails(open_tier):
    """A prompt's chunks are written from its beginning, and its end is what stays."""
    store = open_tier(8 * SIZE, KeepTheTail())
    fill(store, *range(8), position=lambda number: number * 4096)
    fill(store, 100, 101, 102)
    assert store.lookup([key_of(number) for number in (0, 7)]) == [None, SIZE]
    kept = [number for number in range(8) if store.lookup([key_of(number)])[0]]
    assert kept == list(range(8 - len(kept), 8))


def test_heads_go_before_tails_even_if_they_are_used_later(open_tier):
    store = open_tier(2 * SIZE, KeepTheTail())
    fill(store, 1, position=lambda number: 100_000)
    fill(store, 0)
    store.open(key_of(0)).close()
    fill(store, 2)
    assert store.lookup([key_of(1), key_of(0)]) == [SIZE, None]


def test_the_price_is_that_of_the_cost_model():
    head = Candidate(key_of(0), 1000, NOW, position=0, tokens=64)
    tail = head._replace(key=key_of(1), position=8192)
    flat = KeepTheTail(ComputeShape(1.0, 1e-3, 0.0))
    assert flat.saved_s_per_byte(head) == flat.saved_s_per_byte(tail) == pytest.approx(64e-6)
    assert flat.saved_s_per_byte(head._replace(size=2000)) == pytest.approx(32e-6)
    steep = KeepTheTail(ComputeShape(1.0, 1e-3, 1e-6))
    assert steep.saved_s_per_byte(tail) - steep.saved_s_per_byte(head) == pytest.approx(64 * 8192e-9)


def test_only_the_first_part_of_an_order_is_kept_unless_it_lasts():
    chunks = [Candidate(key_of(number), 1, NOW - number) for number in range(16)]
    for name, kept in {"lru": 16, "lfu": 2}.items():
        victims = Victims(policy_named(name))
        assert victims.next() is None
        victims.refill(chunks, NOW)
        names = []
        while (victim := victims.next()) is not None:
            names.append(victim.key)
        assert names == [key_of(15 - number) for number in range(kept)]


def test_policies_by_url(tmp_path):
    for place in ("memory://", f"file://{tmp_path}/store"):
        store = open_store(f"{place}?capacity=1MB&evict=keep_the_tail")
        assert isinstance(store._victims.policy, KeepTheTail)
    with pytest.raises(BadInput, match="there are keep_the_tail, lfu, lru"):
        open_store("memory://?evict=fifo")


# Not writing heads


def test_heads_are_declined():
    store = open_store("memory://?skip_head=40")
    assert isinstance(store, TailOnlyStore)
    kept = [position for position in range(0, 80, 16) if store.write(key_of(position), chunk_of(position, position))]
    assert kept == [32, 48, 64], "a chunk that ends behind the head is kept"
    assert store.stats().chunks == 3
    with pytest.raises(BadInput, match="whole number"):
        open_store("memory://?skip_head=some")
    with pytest.raises(BadInput, match="at least 0"):
        TailOnlyStore(MemoryStore(), -1)


def test_a_place_is_read_from_headers_only():
    assert peek_place(chunk_of(0, 512)) == (512, SHAPE.tokens)
    assert peek_place(b"") == peek_place(bytes(200)) == peek_place(chunk_of(0, 512)[1:]) == (0, 1)
