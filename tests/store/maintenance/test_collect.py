"""What goes first, and what is left alone."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from cakekv.store.disk import DiskStore
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.eviction.keep_the_tail import KeepTheTail
from cakekv.store.eviction.lfu import LeastFrequentlyUsed
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.keyring import Keyring
from cakekv.store.maintenance.collect import garbage, policy_of
from cakekv.store.memory import MemoryStore
from cakekv.store.redis import RedisStore
from cakekv.store.striped import StripedStore
from tests.store.chunks import SIZE, chunk_of, key_of
from tests.store.conftest import Servers

NOW = 1e9


def dated(times: Any, position: Any = lambda number: 0) -> Any:
    """A store of chunks that were used at these times; 0: not known."""
    clock = chain(sorted(times.values()), repeat(NOW))
    store = MemoryStore(clock=lambda: next(clock))
    for number in sorted(times, key=times.__getitem__):
        store.write(key_of(number), chunk_of(number, position(number)))
    return store


def numbers(chunks: Any, count: int = 10) -> list[Any]:
    found = {key_of(number): number for number in range(count)}
    return [found[chunk.key] for chunk in chunks]


def test_what_is_old_goes_and_the_rest_by_age() -> None:
    store = dated({0: NOW - 50, 1: NOW - 10, 2: NOW - 500, 3: NOW - 20})
    going = garbage(store, NOW, capacity=SIZE, older_than_s=100)
    assert (numbers(going.old), numbers(going.surplus)) == ([2], [0, 3])
    assert (going.kept_bytes, going.undated) == (SIZE, 0)


def test_what_has_no_date_does_not_count_as_old() -> None:
    going = garbage(dated({0: 0.0, 1: NOW - 500}), NOW, older_than_s=100)
    assert (numbers(going.old), going.undated) == ([1], 1)


def test_what_fits_stays() -> None:
    store = dated({0: NOW, 1: NOW})
    assert garbage(store, NOW, capacity=2 * SIZE).surplus == []
    assert len(garbage(store, NOW, capacity=2 * SIZE - 1).surplus) == 1


def test_positions_are_read_if_the_policy_wants_them() -> None:
    store = dated(dict.fromkeys(range(4), NOW - 5), position=lambda number: [5000, 0, 9000, 100][number])
    going = garbage(store, NOW, capacity=2 * SIZE, policy=KeepTheTail())
    assert numbers(going.surplus) == [1, 3]


def test_the_stores_own_policy_is_the_default(tmp_path: Path, shared: Servers) -> None:
    stores = [
        (DiskStore(tmp_path / "a", evict=KeepTheTail()), KeepTheTail),
        (StripedStore([DiskStore(tmp_path / "b", evict=LeastFrequentlyUsed())]), LeastFrequentlyUsed),
        (EncryptedStore(MemoryStore(), Keyring([bytes(32)])), LeastRecentlyUsed),
        (RedisStore("127.0.0.1", shared.valkey), LeastRecentlyUsed),
    ]
    for store, policy in stores:
        with store:
            assert isinstance(policy_of(store), policy)


@pytest.mark.parametrize("capacity", [3 * SIZE, 2 * SIZE + 5000])
def test_sealed_chunks_count_as_they_are(capacity: int) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, Keyring([bytes(32)]))
    for number in range(4):
        store.write(key_of(number), chunk_of(number))
    going = garbage(store, NOW, capacity=capacity)
    inner.delete([chunk.key for chunk in going.surplus])
    assert inner.stats().bytes == going.kept_bytes <= capacity
    assert going.kept_bytes + SIZE + 4096 > capacity
