"""What every tier must do. A new tier is one line in `TIERS`."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakekv.errors import BadInput, MissingChunk
from cakekv.store.base import Store, StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.faulty import FaultPlan, FaultyStore
from cakekv.store.keyring import Keyring
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.packed import Pack, PackedStore
from cakekv.store.redis import RedisStore
from cakekv.store.s3 import ObjectStore, open_azure, open_gcs, open_s3
from cakekv.store.striped import StripedStore
from cakekv.store.tail_only import TailOnlyStore
from cakekv.store.throttled import ThrottledStore
from cakekv.store.tiered import TieredStore, TierPlan

from .chunks import SIZE, chunk_of, key_of, opener, read
from .conftest import Servers


class Case(NamedTuple):
    """How to open a tier for a test, and what it does not promise."""

    open: Callable[[Path, int | None, Servers], Store]
    """Takes a folder, by whose name the store may be told from others, and a capacity."""
    bounded: bool = True
    """Whether it has a capacity of its own."""
    keeps_open: bool = True
    """Whether an open chunk outlives its deletion."""
    seals: bool = False
    """Whether it counts bytes of its own beside those of the chunks."""


def open_redis(folder: Path, capacity: Any, shared: Any) -> Any:
    return RedisStore("127.0.0.1", shared.valkey, prefix=f"{folder}:[a-z]*\\:")


def open_mooncake(folder: Path, capacity: Any, shared: Any) -> Any:
    pytest.importorskip(
        "mooncake.store", reason="Mooncake's client is not there, or not for this system", exc_type=ImportError
    )
    from cakekv.store.mooncake import MooncakeStore

    pool = shared.mooncake
    return MooncakeStore("127.0.0.1", pool.port, admin_port=pool.admin_port, prefix=f"{folder}:[a-z]*\\:")


def open_bucket(folder: Path, capacity: Any, shared: Any) -> Any:
    return open_s3("bucket", f"{folder}/100% {folder.name}", endpoint=shared.s3, http=True)


def open_azure_bucket(folder: Path, capacity: Any, shared: Any) -> Any:
    return open_azure("bucket", f"{folder}/100% {folder.name}", endpoint=shared.azure, http=True)


def open_google_bucket(folder: Path, capacity: Any, shared: Any) -> Any:
    return open_gcs("bucket", f"{folder}/100% {folder.name}", endpoint=shared.google, http=True)


def open_tiered(folder: Path, capacity: Any, shared: Any) -> Any:
    inner = (MemoryStore(), DiskStore(folder / "store"))
    return TieredStore([TierPlan(Member(opener(store), store.name)) for store in inner])


TIERS = {
    "memory": Case(lambda folder, capacity, shared: MemoryStore(capacity)),
    "disk": Case(lambda folder, capacity, shared: DiskStore(folder / "store", capacity)),
    "throttled memory": Case(lambda folder, capacity, shared: ThrottledStore(MemoryStore(capacity), 1e12, 1e-6)),
    "faulty memory": Case(lambda folder, capacity, shared: FaultyStore(MemoryStore(capacity), FaultPlan({}))),
    "throttled disk": Case(lambda folder, capacity, shared: ThrottledStore(DiskStore(folder / "s", capacity), 1e12)),
    "striped": Case(
        lambda folder, capacity, shared: StripedStore([DiskStore(folder / name) for name in "abc"]), bounded=False
    ),
    "tiered": Case(open_tiered, bounded=False),
    "tail only": Case(lambda folder, capacity, shared: TailOnlyStore(MemoryStore(capacity), 0)),
    "encrypted": Case(
        lambda folder, capacity, shared: EncryptedStore(DiskStore(folder / "store"), Keyring([bytes(32)])),
        bounded=False,
        seals=True,
    ),
    "packed": Case(lambda folder, capacity, shared: PackedStore(DiskStore(folder / "store", capacity), Pack.YES)),
    "redis": Case(open_redis, bounded=False, keeps_open=False),
    "mooncake": Case(open_mooncake, bounded=False, keeps_open=False),
    "s3": Case(open_bucket, bounded=False, keeps_open=False),
    "google": Case(open_google_bucket, bounded=False, keeps_open=False),
    "azure": Case(open_azure_bucket, bounded=False, keeps_open=False),
}
BOUNDED = [name for name, case in TIERS.items() if case.bounded]


@pytest.fixture(params=TIERS)
def case(request: pytest.FixtureRequest) -> Case:
    return TIERS[request.param]


@pytest.fixture
def open_tier(request: pytest.FixtureRequest, case: Case, tmp_path: Path, shared: Servers) -> Callable[..., Any]:
    def opened(capacity: Any = None, name: str = "tier") -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        store = case.open(folder, capacity, shared)
        request.addfinalizer(store.close)
        return store

    return opened


def check_stats(case: Any, store: Store, chunks: Any, size: int, capacity: Any = None) -> None:
    stats = store.stats()
    assert stats == StoreStats(chunks, stats.bytes if case.seals else size, capacity)
    assert size <= stats.bytes <= size + 4096 * chunks


bounded = pytest.mark.parametrize("case", [TIERS[name] for name in BOUNDED], ids=BOUNDED)


@pytest.fixture
def store(open_tier: Callable[..., Any]) -> Store:
    return open_tier()


def test_a_probe_tells_what_is_stored_or_is_too_dear(store: Store) -> None:
    store.write(key_of(1), chunk_of(1))
    found = store.probe([key_of(number) for number in range(3)])
    assert found == (None if isinstance(store, ObjectStore) else [False, True, False])
    assert store.probe([]) in ([], None)


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.lookup([key_of(0)]) == [None]
    assert list(store) == []
    assert store.stats() == StoreStats(0, 0, None)
    assert store.identities() == {}
    with pytest.raises(MissingChunk):
        store.open(key_of(0))


def test_what_is_written_is_read(case: Case, store: Store) -> None:
    for number in range(3):
        assert store.write(key_of(number), chunk_of(number))
    assert store.lookup([key_of(2), key_of(9), key_of(0)]) == [SIZE, None, SIZE]
    assert store.lookup([]) == []
    for number in range(3):
        assert read(store, key_of(number)) == chunk_of(number)
    check_stats(case, store, 3, 3 * SIZE)
    assert {chunk.key: chunk.size for chunk in store} == {key_of(number): SIZE for number in range(3)}


def test_parts_of_a_chunk_can_be_read(store: Store) -> None:
    store.write(key_of(0), chunk_of(0))
    with store.open(key_of(0)) as reader:
        assert reader.size == SIZE
        assert reader.slice_bytes >= 4096
        for offset, length in [(4096, 100), (0, 10), (SIZE - 5, 5)]:
            buffer = memoryview(bytearray(length))
            assert reader.read_into(buffer, offset) == length
            assert buffer == chunk_of(0)[offset : offset + length]


def test_a_read_past_the_end_says_so(store: Store) -> None:
    store.write(key_of(0), chunk_of(0))
    with store.open(key_of(0)) as reader:
        buffer = memoryview(bytearray(b"\xee" * 10))
        assert reader.read_into(buffer, SIZE - 4) == 4
        assert bytes(buffer) == bytes(chunk_of(0)[-4:]) + b"\xee" * 6
        assert reader.read_into(buffer, SIZE) == 0
        assert reader.read_into(buffer, SIZE + 100) == 0


def test_a_reader_may_be_closed_twice(store: Store) -> None:
    store.write(key_of(0), chunk_of(0))
    reader = store.open(key_of(0))
    reader.close()
    reader.close()


def test_the_writers_buffer_may_be_used_again(store: Store) -> None:
    data = chunk_of(0)
    store.write(key_of(0), data)
    data[:] = bytes(len(data))
    assert read(store, key_of(0)) == chunk_of(0)


def test_writing_again_replaces(case: Case, store: Store) -> None:
    store.write(key_of(0), chunk_of(0))
    assert store.write(key_of(0), chunk_of(1)[:5000])
    assert read(store, key_of(0)) == chunk_of(1)[:5000]
    check_stats(case, store, 1, 5000)


def test_an_open_chunk_outlives_its_deletion_or_is_missed(case: Case, store: Store) -> None:
    store.write(key_of(0), chunk_of(0))
    with store.open(key_of(0)) as reader:
        assert store.delete([key_of(0)]) == 1
        buffer = memoryview(bytearray(SIZE))
        if case.keeps_open:
            assert reader.read_into(buffer, 0) == SIZE
            assert buffer == chunk_of(0)
        else:
            with pytest.raises(MissingChunk):
                reader.read_into(buffer, 0)


def test_deleting(case: Case, store: Store) -> None:
    for number in range(3):
        store.write(key_of(number), chunk_of(number))
    assert store.delete([key_of(0), key_of(7), key_of(2), key_of(2)]) == 2
    assert [chunk.key for chunk in store] == [key_of(1)]
    check_stats(case, store, 1, SIZE)
    with pytest.raises(MissingChunk):
        store.open(key_of(0))


@bounded
def test_the_least_recently_used_goes_first(open_tier: Callable[..., Any]) -> None:
    store = open_tier(3 * SIZE)
    for number in range(3):
        store.write(key_of(number), chunk_of(number))
    store.open(key_of(0)).close()
    for number in (3, 4):
        assert store.write(key_of(number), chunk_of(number))
    assert {chunk.key for chunk in store} == {key_of(0), key_of(3), key_of(4)}
    store.write(key_of(0), chunk_of(0))
    store.write(key_of(5), chunk_of(5))
    assert {chunk.key for chunk in store} == {key_of(4), key_of(0), key_of(5)}
    assert store.stats() == StoreStats(3, 3 * SIZE, 3 * SIZE)


@bounded
def test_use_between_two_evictions_counts(open_tier: Callable[..., Any]) -> None:
    store = open_tier(3 * SIZE)
    for number in range(4):
        store.write(key_of(number), chunk_of(number))
    store.open(key_of(1)).close()
    store.write(key_of(4), chunk_of(4))
    assert {chunk.key for chunk in store} == {key_of(1), key_of(3), key_of(4)}


@bounded
def test_looking_up_is_not_using(open_tier: Callable[..., Any]) -> None:
    store = open_tier(2 * SIZE)
    for number in range(2):
        store.write(key_of(number), chunk_of(number))
    store.lookup([key_of(0)])
    store.write(key_of(2), chunk_of(2))
    assert store.lookup([key_of(0), key_of(1)]) == [None, SIZE]


@bounded
def test_a_chunk_larger_than_the_capacity_is_not_kept(open_tier: Callable[..., Any]) -> None:
    store = open_tier(SIZE)
    assert store.write(key_of(0), chunk_of(0))
    assert not store.write(key_of(1), memoryview(bytes(SIZE + 1)))
    assert read(store, key_of(0)) == chunk_of(0)


@bounded
@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_must_hold_something(open_tier: Callable[..., Any], capacity: int) -> None:
    with pytest.raises(BadInput, match="capacity"):
        open_tier(capacity)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "open", "delete"]), st.integers(0, 6), st.integers(1, 5000)), max_size=30
    ),
)
def test_any_history_gives_what_the_model_gives(case: Case, open_tier: Callable[..., Any], history: Any) -> None:
    """Against the simplest possible store: a dictionary in order of use."""
    capacity = 10_000 if case.bounded else None
    store = open_tier(capacity, secrets.token_hex(8))
    model: dict[Any, Any] = {}
    for action, number, size in history:
        key = key_of(number)
        if action == "write":
            data = chunk_of(number + size)[:size]
            assert store.write(key, data)
            others = {other: held for other, held in model.items() if other != key}
            # A tier may, but need not, make room for the new chunk beside the one it replaces.
            kept = {other: held for other, held in others.items() if store.lookup([other])[0] is not None}
            assert list(kept) == list(others)[len(others) - len(kept) :], "evicted out of order"
            if capacity is None or sum(len(held) for held in model.values()) + size <= capacity:
                assert kept == others, "evicted without need"
            model = kept | {key: bytes(data)}
        elif action == "open" and key in model:
            assert read(store, key) == model[key]
            model[key] = model.pop(key)
        elif action == "delete":
            assert store.delete([key]) == (model.pop(key, None) is not None)
        assert {chunk.key: chunk.size for chunk in store} == {key: len(data) for key, data in model.items()}
        check_stats(case, store, len(model), sum(map(len, model.values())), capacity)
        assert capacity is None or store.stats().bytes <= capacity


def test_many_threads_share_a_store(case: Case, open_tier: Callable[..., Any]) -> None:
    capacity = 6 * SIZE if case.bounded else None
    store = open_tier(capacity)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        start.wait()
        for _ in range(30):
            number = choose.randrange(12)
            if choose.random() < 0.5:
                store.write(key_of(number), chunk_of(number))
            elif choose.random() < 0.2:
                store.delete([key_of(number)])
            else:
                with suppress(MissingChunk):
                    assert read(store, key_of(number)) == chunk_of(number)
            assert capacity is None or store.stats().bytes <= capacity

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    chunks = list(store)
    check_stats(case, store, len(chunks), sum(chunk.size for chunk in chunks), capacity)


def test_identities_are_remembered(store: Store) -> None:
    roots = [key_of(number).hex() for number in range(2)]
    store.remember_identity(roots[0], {"weights": "é", "dtype": "float32"})
    store.remember_identity(roots[1], {"weights": "other"})
    store.remember_identity(roots[0], {"weights": "é", "dtype": "float32"})
    assert store.identities() == {roots[0]: {"weights": "é", "dtype": "float32"}, roots[1]: {"weights": "other"}}
    assert list(store) == []
