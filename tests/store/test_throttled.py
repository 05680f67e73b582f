"""The link: as fast as asked for, to a few parts in a hundred, and shared fairly. On a clock of its own."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cakekv.errors import BadInput
from cakekv.store.base import Store
from cakekv.store.memory import MemoryStore
from cakekv.store.throttled import GRACE_S, ThrottledStore

from .chunks import key_of

SIZE = 2_000_000


class Clock:
    """Time that passes only by sleeping, and by a little too much each time, as on a busy machine."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now = 100.0
        self.oversleep_s = oversleep_s

    def __call__(self) -> Any:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.oversleep_s


class CrowdClock:
    """Time for several threads: it moves on to the next one to wake when all are asleep, and only then."""

    def __init__(self, threads: Any) -> None:
        self.now = 100.0
        self._awake = threads
        self._alarms: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self) -> Any:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._changed:
            alarm = self.now + seconds
            self._alarms.append(alarm)
            self._awake -= 1
            self._advance()
            self._changed.wait_for(lambda: self.now >= alarm)

    def leave(self) -> None:
        with self._changed:
            self._awake -= 1
            self._advance()

    def _advance(self) -> None:
        if not self._awake and self._alarms:
            self.now = min(self._alarms)
            woken = self._alarms.count(self.now)
            self._alarms = [alarm for alarm in self._alarms if alarm > self.now]
            self._awake = woken
            self._changed.notify_all()


def throttled(clock: Any, bandwidth: float, latency_s: float = 0.0, chunks: int = 1) -> Any:
    inner = MemoryStore()
    for number in range(chunks):
        inner.write(key_of(number), memoryview(bytes(SIZE)))
    return ThrottledStore(inner, bandwidth, latency_s, clock=clock, sleep=clock.sleep)


def read_slices(store: Store, number: int = 0, pause: Any = lambda: None, until: Any = SIZE) -> None:
    with store.open(key_of(number)) as reader:
        buffer = memoryview(bytearray(SIZE))
        for offset in range(0, until, reader.slice_bytes):
            pause()
            reader.read_into(buffer[offset : offset + reader.slice_bytes], offset)


@pytest.mark.parametrize("bandwidth", [100_000, 10e6, 1e9, 50e9])
@pytest.mark.parametrize("oversleep_s", [0.0, 0.0005, 0.005])
def test_the_bandwidth_is_exact(bandwidth: float, oversleep_s: float) -> None:
    clock = Clock(oversleep_s)
    store = throttled(clock, bandwidth)
    began = clock.now
    rounds = math.ceil(bandwidth / SIZE)
    rounds = min(rounds, 50)
    for _ in range(rounds):
        read_slices(store)
    expected = rounds * SIZE / bandwidth
    assert expected * (1 - 1e-9) <= clock.now - began <= expected * 1.03 + oversleep_s


def test_work_between_reads_is_made_up_for() -> None:
    clock = Clock()
    store = throttled(clock, 1e6)

    def pause() -> None:
        clock.now += 0.009

    began = clock.now
    read_slices(store, pause=pause)
    assert clock.now - began == pytest.approx(2, rel=0.03)


def test_an_idle_link_saves_nothing_up() -> None:
    clock = Clock()
    store = throttled(clock, 1e6)
    for _ in range(3):
        clock.now += 2 * GRACE_S
        began = clock.now
        read_slices(store, until=10_000)
        assert clock.now - began == pytest.approx(0.01)


def test_one_large_read_takes_as_long_as_many_small_ones() -> None:
    clock = Clock()
    store = throttled(clock, 1e6)
    began = clock.now
    with store.open(key_of(0)) as reader:
        assert reader.read_into(memoryview(bytearray(SIZE + 5)), 0) == SIZE
        assert reader.read_into(memoryview(bytearray(5)), SIZE) == 0
    assert clock.now - began == pytest.approx(2)


def test_readers_share_fairly() -> None:
    clock = CrowdClock(threads=2)
    store = throttled(clock, 1e6, chunks=2)
    finished = {}

    def work(number: int) -> None:
        read_slices(store, number)
        finished[number] = clock.now - 100
        clock.leave()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert sorted(finished.values()) == pytest.approx([4, 4], rel=0.01)


def test_the_bandwidth_can_change_in_mid_read() -> None:
    clock = Clock()
    store = throttled(clock, 1e6)
    began = clock.now
    with store.open(key_of(0)) as reader:
        buffer = memoryview(bytearray(SIZE // 2))
        reader.read_into(buffer, 0)
        store.set_bandwidth(4e6)
        reader.read_into(buffer, SIZE // 2)
    assert clock.now - began == pytest.approx(1.25)
    with pytest.raises(BadInput, match="bandwidth"):
        store.set_bandwidth(0)


def test_the_latency_is_paid_once_a_chunk_and_once_a_lookup() -> None:
    clock = Clock()
    store = throttled(clock, math.inf, latency_s=0.5, chunks=2)
    assert store.lookup([key_of(0), key_of(1)]) == [SIZE, SIZE]
    assert clock.now == 100.5
    read_slices(store, 0)
    read_slices(store, 1)
    assert clock.now == 101.5


@pytest.mark.parametrize(
    ("bandwidth", "slice_bytes"), [(1, 4096), (50e6, 500_000), (1e12, 1 << 20), (math.inf, 1 << 20)]
)
def test_a_slice_is_ten_milliseconds_within_limits(bandwidth: float, slice_bytes: int) -> None:
    with throttled(Clock(), bandwidth).open(key_of(0)) as reader:
        assert reader.slice_bytes == slice_bytes


def test_writes_are_not_slowed_down_and_the_name_is_the_tiers() -> None:
    clock = Clock()
    store = throttled(clock, 1.0, 1.0)
    store.write(key_of(5), memoryview(bytes(SIZE)))
    assert clock.now == 100
    assert store.name == "memory"


@pytest.mark.parametrize(
    ("bandwidth", "latency_s"), [(0, 0), (-1, 0), (math.nan, 0), (1, -1), (1, math.nan), (1, math.inf)]
)
def test_impossible_links_are_refused(bandwidth: float, latency_s: float) -> None:
    with pytest.raises(BadInput):
        ThrottledStore(MemoryStore(), bandwidth, latency_s)
