"""Copies to a tier that is written back: what becomes of those that wait when their process ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from cakekv.errors import StoreError
from cakekv.store.disk import DiskStore
from cakekv.store.folder import UNCOPIED, Folder
from cakekv.store.maintenance.walking import leave_no_trace
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.redis import RedisStore
from cakekv.store.tiered import TieredStore, TierPlan, Writing
from cakekv.store.waiting_in_folder import WaitingInFolder
from tests.store.conftest import Servers

from .chunks import chunk_of, key_of, read
from .moody import Moody, eventually

WRITER = """
import sys
from cakekv.store.disk import DiskStore
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.redis import RedisStore
from cakekv.store.tiered import TieredStore, TierPlan, Writing
from tests.store.chunks import chunk_of, key_of
import threading

class Slow(MemoryStore):
    def write(self, key, data):
        threading.Event().wait()

plan = [TierPlan(Member(lambda: DiskStore(sys.argv[1]), "disk"))]
plan += [TierPlan(Member(Slow, "slow"), Writing.BACK)]
store = TieredStore(plan)
for number in range(int(sys.argv[2])):
    store.write(key_of(number), chunk_of(number))
print("written", flush=True)
threading.Event().wait()
"""


def reopened(folder: Path, back: Any, **options: Any) -> Any:
    member = Member(lambda: back, "back", **{"first_retry_s": 0.01, **options})
    return TieredStore([TierPlan(Member(lambda: DiskStore(folder), "front")), TierPlan(member, Writing.BACK)])


def notes_in(folder: Path) -> list[Any]:
    return [file.name for file in (folder / UNCOPIED).glob("*") if file.stat().st_size]


@pytest.fixture
def killed(folder: Path) -> Path:
    """A folder of 20 chunks, none of which its writer got to copy before it was killed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, folder, "20"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    return folder


def test_what_a_killed_process_left_is_copied_by_the_next(killed: Path) -> None:
    back = MemoryStore()
    with reopened(killed, back) as store:
        store.lookup([key_of(0)])
        assert store.waiting > 0 or back.stats().chunks == 20
        store.flush()
        assert {chunk.key for chunk in back} == {key_of(number) for number in range(20)}
        assert read(back, key_of(7)) == chunk_of(7)
        assert (store.waiting, store.uncopied) == (0, 0)
    assert notes_in(killed) == []


def test_what_the_tier_has_already_is_not_written_again(killed: Path) -> None:
    back = Moody()
    for number in range(15):
        back.write(key_of(number), chunk_of(number))
    back.asked.clear()
    with reopened(killed, back) as store:
        store.lookup([key_of(0)])
        store.flush()
    assert back.asked.count("write") == 5


def test_nothing_is_taken_from_a_living_process(folder: Path) -> None:
    back, other = Moody(), MemoryStore()
    back.well.clear()
    store = reopened(folder, back)
    with pytest.raises(StoreError):
        store.members[1].lookup([key_of(0)])
    store.write(key_of(0), chunk_of(0))
    with reopened(folder, other) as second:
        second.lookup([key_of(0)])
        second.flush()
        assert other.stats().chunks == 0
    back.well.set()
    eventually(lambda: store.waiting == 0)
    store.close()
    assert notes_in(folder) == []


def test_a_command_that_only_looks_copies_nothing(killed: Path) -> None:
    back = MemoryStore()
    with reopened(killed, back) as store:
        leave_no_trace(store)
        list(store)
        store.lookup([key_of(0)])
        read(store, key_of(0))
        store.flush()
    assert back.stats().chunks == 0
    assert notes_in(killed)


def test_copies_that_a_tier_was_away_for_are_made_the_next_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    back = Moody(name="back")
    told = []
    with reopened(folder, back, first_retry_s=100) as store:
        store.on_uncopied = lambda tier, chunks: told.append((tier, chunks))
        back.well.clear()
        with pytest.raises(StoreError):
            store.members[1].lookup([key_of(0)])
        for number in range(8):
            assert store.write(key_of(number), chunk_of(number))
        assert store.waiting == 8
        with caplog.at_level(logging.INFO, "cakekv"):
            store.close()
        assert store.uncopied == 8
        assert told == [("back", 1)] * 8
    (event,) = [record for record in caplog.records if getattr(record, "event", "") == "uncopied"]
    assert vars(event)["fields"] == {"tier": "back", "chunks": 8, "copied": "when the store is used again"}
    back.well.set()
    with reopened(folder, back) as store:
        store.write(key_of(8), chunk_of(8))
        store.flush()
        assert back.stats().chunks == 9


def test_copies_out_of_memory_alone_are_lost_and_said_to_be(
    caplog: pytest.LogCaptureFixture, member: Callable[..., Any]
) -> None:
    back = Moody(name="back")
    plan = [TierPlan(Member(MemoryStore, "memory")), TierPlan(member(back, first_retry_s=100), Writing.BACK)]
    store = TieredStore(plan)
    back.well.clear()
    with pytest.raises(StoreError):
        store.members[1].lookup([key_of(0)])
    store.write(key_of(0), chunk_of(0))
    with caplog.at_level(logging.WARNING, "cakekv"):
        store.close()
    assert "uncopied tier=back chunks=1 copied=never" in caplog.text


def test_a_server_in_front_keeps_notes_too(tmp_path: Path, shared: Servers) -> None:
    back = Moody(name="back")

    def opened(**options: Any) -> Any:
        front = Member(lambda: RedisStore("127.0.0.1", shared.valkey, prefix=f"{tmp_path}:"), "front")
        return TieredStore([TierPlan(front), TierPlan(Member(lambda: back, "back", **options), Writing.BACK)])

    back.well.clear()
    with opened(first_retry_s=100) as store:
        with pytest.raises(StoreError):
            store.members[1].lookup([key_of(0)])
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
    assert store.uncopied == 3
    back.well.set()
    with opened() as store:
        store.lookup([key_of(0)])
        store.flush()
        assert back.stats().chunks == 3
    assert redis.Redis(port=shared.valkey).exists(f"{tmp_path}:uncopied") == 0


def test_a_front_tier_that_is_away_does_not_make_a_chunk_gone(killed: Path) -> None:
    front, back = threading.Event(), MemoryStore()

    def opened() -> Any:
        if not front.is_set():
            raise StoreError("not mounted yet")
        return DiskStore(killed)

    plan = [TierPlan(Member(MemoryStore, "memory")), TierPlan(Member(opened, "disk", first_retry_s=0.01))]
    with TieredStore([*plan, TierPlan(Member(lambda: back, "back"), Writing.BACK)]) as store:
        store.lookup([key_of(0)])
        assert back.stats().chunks == 0
        front.set()
        eventually(lambda: store.members[1].is_up)
        store.lookup([key_of(0)])
        store.flush()
        assert back.stats().chunks == 20


def test_a_chunk_that_was_evicted_meanwhile_is_not_noted_for_ever(killed: Path) -> None:
    DiskStore(killed).delete([key_of(number) for number in range(20)])
    with reopened(killed, MemoryStore()) as store:
        store.lookup([key_of(0)])
        store.flush()
        assert store.uncopied == 20
    assert notes_in(killed) == []


def test_a_folder_that_cannot_take_notes_still_takes_chunks(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    DiskStore(folder)
    (folder / UNCOPIED).write_text("a file in its place")
    back = MemoryStore()
    with reopened(folder, back) as store:
        assert store.write(key_of(0), chunk_of(0))
        assert store.write(key_of(1), chunk_of(1))
        store.flush()
    assert back.stats().chunks == 2
    assert caplog.text.count("copies_not_noted") == 1


# The notes by themselves


@pytest.fixture
def notes(folder: Path) -> Callable[..., Any]:
    DiskStore(folder)
    return lambda: WaitingInFolder(Folder(folder))


def test_notes_cut_off_in_mid_record(notes: Callable[..., Any], folder: Path) -> None:
    first = notes()
    first.add([key_of(0), key_of(1)])
    first.remove(key_of(0))
    (file,) = (folder / UNCOPIED).iterdir()
    with file.open("ab") as stream:
        stream.write(b"+" + bytes(5))
    first.close()
    second = notes()
    assert second.take_over() == [key_of(1)]
    assert second.take_over() == []


def test_notes_do_not_grow_without_bound(notes: Callable[..., Any], folder: Path) -> None:
    mine = notes()
    mine.add([key_of(0)])
    for number in range(1, 6000):
        mine.add([key_of(number)])
        mine.remove(key_of(number))
    assert sum(file.stat().st_size for file in (folder / UNCOPIED).iterdir()) < 6000 * 33
    mine.close()
    assert notes().take_over() == [key_of(0)]


def test_a_store_with_notes_is_tidy(notes: Callable[..., Any], folder: Path) -> None:
    mine = notes()
    mine.add([key_of(0)])
    assert DiskStore(folder).tidy() == []
