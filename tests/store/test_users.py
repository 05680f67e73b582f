"""A folder that several users meet in: whose files are whose, who may read them, and what is said if one may not."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, NotDeleted, ReadOnly, StoreError, Unreadable
from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.maintenance.collect import delete
from cakekv.store.maintenance.copying import copy
from cakekv.store.maintenance.verify import repair, verify
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.tiered import TieredStore, TierPlan

from .chunks import SIZE, chunk_of, key_of, read
from .disk_folder import file_of, fill, keys

ANNA, BERT = 61001, 61002
TEAM = 61000

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in which everybody may make folders."""
    place = Path(tempfile.mkdtemp(prefix="cakekv-users-"))
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


def by(user: Any, work: Any, *, groups: Any = (), umask: int = 0o022) -> Any:
    """What a function returns, or the error that it raises, when that user runs it in a process of its own."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.umask(umask)
            os.setgroups(groups)
            os.setgid(user)
            os.setuid(user)
            try:
                result = work()
            except Exception as error:
                result = error
            with open(sending, "wb") as stream:
                pickle.dump(result, stream)
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as stream:
        result = pickle.load(stream)
    os.waitpid(child, 0)
    return result


def saving(folder: Path, *numbers: int, **options: Any) -> Any:
    def work() -> None:
        with DiskStore(folder, **options) as store:
            fill(store, *numbers)
            store.remember_identity(key_of(9).hex(), {"dtype": "float32"})
            store.delete([key_of(77)])

    return work


def loading(folder: Path, *numbers: int) -> Any:
    def work() -> list[Any]:
        with DiskStore(folder) as store:
            sizes = store.lookup([key_of(number) for number in numbers])
            return [size is not None and read(store, key_of(number)) == chunk_of(number)
                    for number, size in zip(numbers, sizes, strict=True)]  # fmt: skip

    return work


def owners(folder: Path) -> set[Any]:
    return {path.stat().st_uid for path in folder.rglob("*")}


def test_what_root_does_in_a_store_does_not_lock_its_owner_out(place: Path) -> None:
    folder = place / "kv"
    assert by(ANNA, saving(folder, 0, 1, 2)) is None
    with DiskStore(folder, 3 * SIZE) as store:
        fill(store, 3, 4)  # into folders that are new, and evicts, which is noted
        store.remember_identity(key_of(8).hex(), {"dtype": "bfloat16"})
        store.delete([key_of(3)])
        verify(store)
        repair(store)
    assert owners(folder) == {ANNA}
    assert by(ANNA, loading(folder, 2, 4)) == [True, True]
    assert by(ANNA, saving(folder, 5, 6)) is None


def test_root_begins_a_store_in_a_folder_of_somebody(place: Path) -> None:
    folder = place / "kv"
    folder.mkdir()
    os.chown(folder, ANNA, ANNA)
    saving(folder, 0)()
    assert owners(folder) == {ANNA}
    assert by(ANNA, loading(folder, 0)) == [True]


def test_root_gives_away_no_file_that_was_there(place: Path) -> None:
    """Whoever owns a folder could put another name of a file in the place of one that root writes to."""
    folder = place / "kv"
    by(ANNA, saving(folder, 0))
    treasure = place / "treasure"
    treasure.touch(mode=0o600)
    for name in ("removals.log", "cakekv-store.json.new"):
        (folder / name).unlink(missing_ok=True)
        os.link(treasure, folder / name)
    with DiskStore(folder) as store:
        store.delete([key_of(0)])
    assert treasure.stat().st_uid == 0


def test_chunks_of_another_user_are_misses(place: Path, caplog: Any) -> None:
    folder = place / "kv"
    by(ANNA, saving(folder, 0, 1, 2))
    file_of(folder, 0).chmod(0o600)
    os.chown(file_of(folder, 0), 0, 0)

    def logged() -> list[Any]:
        with DiskStore(folder) as store:
            store.lookup([key_of(0), key_of(1)])
            store.lookup([key_of(0), key_of(1)])
        return [vars(record)["fields"] for record in caplog.records if vars(record)["event"] == "unreadable"]

    with caplog.at_level(logging.WARNING):
        (line,) = by(ANNA, logged)
    assert line["path"] == str(file_of(folder, 0))
    assert "belongs to user root and has mode 0600" in line["reason"]

    shard = file_of(folder, 1).parent
    os.chown(shard, 0, 0)
    shard.chmod(0o700)
    assert by(ANNA, loading(folder, 0, 1, 2)) == [False, False, True]
    with caplog.at_level(logging.WARNING):
        (line,) = by(ANNA, logged)
    assert line["path"] == str(shard)
    error = by(ANNA, lambda: DiskStore(folder).open(key_of(1)))
    assert isinstance(error, Unreadable)
    assert f"{shard} belongs to user root and has mode 0700" in str(error)
    assert by(ANNA, saving(folder, 0)) is None  # in its own folder it is replaced
    assert by(ANNA, loading(folder, 0)) == [True]
    error = by(ANNA, saving(folder, 1))
    assert isinstance(error, StoreError)
    assert f"{shard} belongs to user root" in str(error)


def test_maintenance_goes_past_chunks_of_another_user(place: Path) -> None:
    folder = place / "kv"
    by(ANNA, saving(folder, 0, 1, 2))
    os.chown(file_of(folder, 0), 0, 0)

    def work() -> Any:
        with DiskStore(folder) as store:
            (condition,) = verify(store)
            copied = copy(store, MemoryStore())
            (done,) = repair(store)
        return condition, copied, done

    condition, copied, done = by(ANNA, work)
    assert (condition.chunks, condition.corrupt, condition.vanished) == (2, {}, 0)
    assert f"{file_of(folder, 0)} belongs to user root" in condition.unreadable[key_of(0)]
    assert (copied.chunks, list(copied.failed)) == (2, [key_of(0)])
    assert done.deleted == 0
    assert file_of(folder, 0).exists()


def test_the_store_of_another_user_says_whose_it_is(place: Path) -> None:
    folder = place / "kv"
    by(ANNA, saving(folder, 0))
    error = by(BERT, loading(folder, 0))
    assert isinstance(error, StoreError)
    assert f"{folder} belongs to user {ANNA} and has mode 0700" in str(error)
    assert "?mode=group" in str(error)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_group_shares_a_folder(place: Path, umask: int) -> None:
    folder = place / "kv"
    team: dict[str, Any] = {"groups": [TEAM], "umask": umask}
    os.chown(place, -1, TEAM)
    place.chmod(0o2770)
    assert by(ANNA, saving(folder, 0, mode="group"), **team) is None
    assert by(BERT, loading(folder, 0), **team) == [True]
    assert by(BERT, saving(folder, 1, 2), **team) is None  # that it is shared is seen
    assert by(ANNA, loading(folder, 0, 1, 2), **team) == [True, True, True]

    def gone() -> Any:
        with DiskStore(folder, SIZE) as store:
            return store.delete([key_of(0), key_of(1), key_of(2)])

    assert by(ANNA, gone, **team) == 1, "the other two were evicted, whoever wrote them"
    for path in [folder, *folder.rglob("*")]:
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o2770 if path.is_dir() else 0o660, TEAM), path
    assert isinstance(by(61003, loading(folder, 0)), StoreError)


def test_using_a_shared_chunk_is_noted_whoever_wrote_it(place: Path) -> None:
    folder = place / "kv"
    os.chown(place, -1, TEAM)
    place.chmod(0o2770)
    by(ANNA, saving(folder, 0, mode="group"), groups=[TEAM])
    os.utime(file_of(folder, 0), (1e9, 1e9))
    assert by(BERT, loading(folder, 0), groups=[TEAM]) == [True]
    assert file_of(folder, 0).stat().st_mtime > 1.5e9


def test_a_private_store_becomes_a_shared_one(place: Path) -> None:
    folder = place / "kv"
    by(ANNA, saving(folder, 0))
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, -1, TEAM)
    place.chmod(0o755)
    assert by(ANNA, saving(folder, 1, mode="group"), groups=[TEAM]) is None
    assert by(BERT, loading(folder, 0, 1), groups=[TEAM]) == [False, True], "what was private stays private"
    assert isinstance(by(BERT, saving(place / "kv", 2, mode="group"), groups=[TEAM]), type(None))


def test_a_new_store_is_private_also_in_a_folder_that_a_group_may_write_to(place: Path) -> None:
    folder = place / "kv"
    folder.mkdir()
    folder.chmod(0o2777)
    by(ANNA, saving(folder, 0))
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o077 for path in folder.rglob("*"))


def test_there_are_two_modes(place: Path) -> None:
    with pytest.raises(BadInput, match=r"option 'mode' .*private, group"):
        open_store(f"{place}/kv?mode=0777")
    with open_store(f"{place}/kv?mode=group&stripe={place}/kv2") as store:
        fill(store, 0)
    assert stat.S_IMODE((place / "kv2").stat().st_mode) == 0o2770


# To load from only


def check_read_only(folder: Path) -> Any:
    """Opens, loads, lists and explains; says why nothing is saved."""
    with DiskStore(folder, SIZE) as store:  # smaller than it is: nothing can be evicted
        assert store.lookup([key_of(0), key_of(5)]) == [SIZE, None]
        assert read(store, key_of(0)) == chunk_of(0)
        assert keys(store) == {key_of(0), key_of(1)}
        assert store.stats() == StoreStats(2, 2 * SIZE, SIZE)
        assert list(store.identities()) == [key_of(9).hex()]
        assert store.removals([key_of(0)]) == {}
        attempts = [
            lambda: store.write(key_of(2), chunk_of(2)),
            lambda: store.delete([key_of(0)]),
            lambda: store.remember_identity(key_of(3).hex(), {}),
            store.tidy,
        ]
        said = []
        for attempt in attempts:
            with pytest.raises(ReadOnly, match="could only be opened for loading") as caught:
                attempt()
            said.append(str(caught.value))
        members = [Member(lambda: DiskStore(folder), "disk"), Member(MemoryStore, "memory")]
        with TieredStore([TierPlan(member) for member in members]) as tiered:
            for number in range(10, 16):
                assert tiered.write(key_of(number), chunk_of(number))
            assert members[0].is_up, "that nothing can be written does not take a tier away"
            assert read(tiered, key_of(0)) == chunk_of(0)
    return said


def test_a_folder_that_this_user_may_only_read(place: Path) -> None:
    folder = place / "kv"
    by(ANNA, saving(folder, 0, 1))
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    said = by(BERT, lambda: check_read_only(folder))
    assert isinstance(said, list), said
    assert f"{folder}/cakekv.lock belongs to user {ANNA} and has mode 0644" in said[0]


def test_a_file_system_that_is_mounted_read_only(place: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        saving(place / "kv", 0, 1)()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert all("Read-only file system" in text for text in check_read_only(place / "kv"))
        with pytest.raises(StoreError, match="can be written to"):
            DiskStore(place / "another")
    finally:
        subprocess.run(["umount", place], check=True)


# What cannot be removed


@pytest.fixture
def stuck(place: Path) -> Iterator[Path]:
    """A store of six chunks, of which one cannot be removed: something is mounted there."""
    folder = place / "kv"
    with DiskStore(folder) as store:
        fill(store, *range(6))
    file = file_of(folder, 2)
    shutil.copy(file, place / "same")
    if subprocess.run(["mount", "--bind", place / "same", file], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", file], check=True)


def test_deleting_goes_past_it_and_names_it(stuck: Path) -> None:
    with DiskStore(stuck) as store:
        with pytest.raises(NotDeleted, match=f"cannot delete 1 of 6 chunks: .*{file_of(stuck, 2)}") as caught:
            delete(store, list(store))
        assert caught.value.deleted == 5
        assert keys(store) == {key_of(2)}
        assert store.stats() == StoreStats(1, SIZE, None)


def test_eviction_goes_past_it_and_names_it(stuck: Path, caplog: Any) -> None:
    os.utime(file_of(stuck, 2), (1e9, 1e9))  # the first to go
    with caplog.at_level(logging.WARNING), DiskStore(stuck, 3 * SIZE) as store:
        for number in range(10, 200):
            assert store.write(key_of(number), chunk_of(number))
            assert store.stats().bytes <= 3 * SIZE
        assert key_of(2) in keys(store)
        (line,) = [record.fields for record in caplog.records if record.event == "not_evicted"]
        assert str(file_of(stuck, 2)) in line["reason"]
    with DiskStore(stuck, SIZE) as store:
        assert keys(store) == {key_of(2)}
        assert not store.write(key_of(1), chunk_of(1)), "there is no room that could be made"


def test_the_command_line_goes_past_it(stuck: Path) -> None:
    from typer.testing import CliRunner

    from cakekv.cli.main import app

    result = CliRunner().invoke(app, ["store", "gc", str(stuck), "--capacity", str(SIZE // 2)])
    assert (result.exit_code, "5 were deleted" in result.stdout) == (1, True)
    assert file_of(stuck, 2).name in result.stderr
    result = CliRunner().invoke(app, ["store", "rm", str(stuck), "--all", "--json"])
    assert (result.exit_code, result.stdout) == (1, '{\n  "deleted": 0\n}\n')
    assert file_of(stuck, 2).name in result.stderr
