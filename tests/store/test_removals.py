"""What tiers remember of the chunks that they removed: bounded, private, and none the worse for damage."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from cakekv.keys import ChunkKey
from cakekv.store import removals
from cakekv.store.disk import DiskStore
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.keyring import Keyring
from cakekv.store.maintenance.explain import explain_prompt, prompt_keys
from cakekv.store.memory import MemoryStore
from cakekv.store.removals import CAPACITY, REQUEST, RecentRemovals, RemovalLog
from cakekv.store.striped import StripedStore
from tests.store.conftest import Servers

from .chunks import SIZE, chunk_of, key_of

RECORD = 56


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "removals.log"


def keys(*numbers: int) -> list[ChunkKey]:
    return [key_of(number) for number in numbers]


def reasons(found: Any) -> dict[Any, Any]:
    return {key: removal.reason for key, removal in found.items()}


@pytest.mark.parametrize("kind", ["memory", "disk", "encrypted", "striped"])
def test_evictions_and_deletions_are_told_apart(tmp_path: Path, kind: str) -> None:
    made = {
        "memory": lambda: MemoryStore(2 * SIZE),
        "disk": lambda: DiskStore(tmp_path / "kv", 2 * SIZE),
        "encrypted": lambda: EncryptedStore(MemoryStore(2 * SIZE + 9000), Keyring([bytes(32)])),
        "striped": lambda: StripedStore([DiskStore(tmp_path / "kv", 2 * SIZE)]),
    }
    with made[kind]() as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
        store.delete(keys(2, 9))
        found = store.removals(keys(0, 1, 2, 9))
        assert found is not None
        assert reasons(found) == {key_of(0): "capacity", key_of(2): "request"}
        assert found[key_of(0)].at <= found[key_of(2)].at


def test_another_process_can_read_the_log(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "kv") as store:
        store.write(key_of(0), chunk_of(0))
    with DiskStore(tmp_path / "kv", SIZE - 1):
        pass
    assert reasons(DiskStore(tmp_path / "kv").removals(keys(0))) == {key_of(0): "capacity"}


def test_a_server_does_not_tell(shared: Servers) -> None:
    from cakekv.store.redis import RedisStore

    with RedisStore("127.0.0.1", shared.valkey, prefix="removals:") as store:
        store.delete(keys(0))
        assert store.removals(keys(0)) is None


def test_the_log_is_bounded_and_private_and_keeps_the_newest(file: Path) -> None:
    log = RemovalLog(file, max_bytes=10 * RECORD)
    for number in range(35):
        log.note(keys(number), CAPACITY)
    assert [path.stat().st_size <= 10 * RECORD for path in file.parent.iterdir()] == [True, True]
    assert {stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()} == {0o600}
    assert set(log.find(keys(*range(35)))) == set(keys(*range(20, 35)))
    log.note(keys(*range(100)), REQUEST)
    assert set(log.find(keys(*range(100)))) >= set(keys(*range(90, 100)))
    assert file.stat().st_size <= 10 * RECORD


def test_the_last_removal_counts(file: Path) -> None:
    log = RemovalLog(file, max_bytes=4 * RECORD)
    for reason in (CAPACITY, REQUEST, CAPACITY, REQUEST, CAPACITY, REQUEST):
        log.note(keys(1), reason)
    assert reasons(log.find(keys(1))) == {key_of(1): REQUEST}


@pytest.mark.parametrize("torn", [1, RECORD - 1, RECORD + 10])
def test_a_torn_record_costs_itself_only(file: Path, torn: int) -> None:
    log = RemovalLog(file)
    log.note(keys(0, 1), CAPACITY)
    os.truncate(file, 2 * RECORD - torn if torn < RECORD else RECORD - 10)
    log.note(keys(2), CAPACITY)
    assert set(log.find(keys(0, 1, 2))) == set(keys(0, 2) if torn < RECORD else keys(2))


def test_a_damaged_record_is_not_believed(file: Path) -> None:
    log = RemovalLog(file)
    log.note(keys(0, 1), CAPACITY)
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    assert set(log.find(keys(0, 1))) == set(keys(1))
    file.write_bytes(os.urandom(10_000))
    assert log.find(keys(0, 1)) == {}


@pytest.mark.parametrize("trick", ["symlink", "pipe", "folder"])
def test_what_is_no_plain_file_is_left_alone(tmp_path: Path, file: Path, trick: str) -> None:
    other = tmp_path / "other"
    other.write_text("dear")
    {"symlink": lambda: file.symlink_to(other), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[trick]()
    log = RemovalLog(file)
    log.note(keys(0), CAPACITY)
    assert log.find(keys(0)) == {}
    assert other.read_text() == "dear"


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "kv", SIZE) as store:
        (tmp_path / "kv" / "removals.log").mkdir()
        for number in range(2):
            assert store.write(key_of(number), chunk_of(number))
        assert store.delete(keys(1)) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removals, "MOST_REMEMBERED", 3)
    recent = RecentRemovals()
    recent.note(keys(0, 1), CAPACITY)
    recent.note(keys(0), REQUEST)
    recent.note(keys(2, 3), CAPACITY)
    assert reasons(recent.find(keys(*range(4)))) == {
        key_of(0): REQUEST,
        key_of(2): CAPACITY,
        key_of(3): CAPACITY,
    }


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 4e12, -5.0, 0.0])
def test_times_that_are_none_are_not_passed_on(file: Path, at: float) -> None:
    """Whoever may write to a folder may put any number there, with the checksum that belongs to it."""
    part = removals._FIELDS.pack(key_of(0), at, 200)
    file.write_bytes(removals._RECORD.pack(part, xxh3_64_intdigest(part)))
    assert RemovalLog(file).find(keys(0)) == {key_of(0): (0.0, REQUEST)}


def test_such_a_time_is_explained(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "kv") as store:
        root = bytes(32)
        fields = {"chunk_tokens": "4"}
        (key,) = prompt_keys(root, fields, [1, 2, 3, 4])
        part = removals._FIELDS.pack(key, float("nan"), 0)
        (tmp_path / "kv" / "removals.log").write_bytes(removals._RECORD.pack(part, xxh3_64_intdigest(part)) + b"torn")
        (chunk,) = explain_prompt(root, fields, [1, 2, 3, 4], [store]).chunks
        assert chunk.reasons == ["evicted from disk, it is not known when"]
