"""Cleaning, copying, migrating, exporting, importing and warming on the command line."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from cakekv.bench.servers import free_port
from cakekv.packed_chunk import unpack_chunk
from cakekv.store.disk import DiskStore
from cakekv.store.opening import open_store
from cakekv.store.redis import RedisStore
from tests.store.chunks import SIZE, chunk_of, key_of, packable_chunk_of, part_of, read
from tests.store.conftest import shared

from .test_store import damage, folder, run, run_json

__all__ = ["folder", "shared"]  # the fixtures

KEYS = ["11" * 32, "22" * 32]


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    file = tmp_path / "kv.keys"
    file.touch(0o600)
    file.write_text(KEYS[0])
    return file


def age(folder: Path, number: int, seconds: float) -> None:
    path = next(folder.glob(f"chunks/*/{key_of(number).hex()[2:]}.chunk"))
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_gc_to_a_size(folder: Path) -> None:
    age(folder, 3, 1000)
    age(folder, 1, 500)
    planned = run_json("gc", folder, "--capacity", 3 * SIZE, "--dry-run")
    assert (planned["surplus"], planned["deleted"]) == (2, 0)
    assert run_json("stats", folder)["chunks"] == 5
    assert run_json("gc", folder, "--capacity", 3 * SIZE) == {
        "old": 0,
        "surplus": 2,
        "bytes": 2 * SIZE,
        "kept_bytes": 3 * SIZE,
        "undated": 0,
        "deleted": 2,
    }
    left = {chunk["key"] for chunk in run_json("ls", folder)}
    assert left == {key_of(number).hex() for number in (0, 2, 4)}


def test_gc_by_age(folder: Path) -> None:
    age(folder, 3, 3 * 86400)
    code, out, _ = run("gc", folder, "--older-than", "2d", "--dry-run")
    assert (code, "Would delete 1 old and 0 surplus" in out) == (0, True)
    assert run_json("gc", folder, "--older-than", "4d")["deleted"] == 0
    assert run_json("gc", folder, "--older-than", "2d")["deleted"] == 1


@pytest.mark.parametrize(
    "options", [(), ("--capacity", "much"), ("--older-than", "soon"), ("--capacity", "1GB", "--evict", "random")]
)
def test_gc_wants_to_know_what(folder: Path, options: tuple[str, ...]) -> None:
    code, _, err = run("gc", folder, *options)
    assert (code, "error: " in err) == (2, True)
    assert run_json("stats", folder)["chunks"] == 5


def test_cp_some_and_all(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert run_json("cp", folder, other, key_of(2).hex()[:10])["copied"] == 1
    damage(folder, 4)
    copied = run_json("cp", folder, other, code=1)
    assert (copied["copied"], copied["present"], [one["key"] for one in copied["corrupt"]]) == (3, 1, [key_of(4).hex()])
    stats = run_json("stats", other)
    assert (stats["chunks"], stats["identities"]) == (4, {"ab" * 32: {"dtype": "bfloat16"}})
    small = run_json("cp", folder, f"{tmp_path / 'third'}?capacity={2 * SIZE}", code=1)
    assert (small["copied"], len(small["corrupt"])) == (1, 1), "of the newest two, one is corrupt"
    code, out, _ = run("cp", other, tmp_path / "fourth", "--limit-bytes", 3 * SIZE)
    assert (code, "3 chunks copied" in out) == (0, True)
    assert run("cp", folder, other, "xyz")[0] == 2
    assert run("cp", tmp_path / "absent", other)[0] == 2


def test_migrate_after_a_key_was_put_in_front(folder: Path, keyring: Path) -> None:
    url = f"{folder}?encrypt={keyring}"
    assert run_json("migrate", url, "--dry-run") == {"moved": 0, "resealed": 5, "corrupt": []}
    assert run_json("migrate", url)["resealed"] == 5
    keyring.write_text("\n".join(reversed(KEYS)))
    code, out, _ = run("migrate", url)
    assert (code, "5 resealed" in out) == (0, True)
    keyring.write_text(KEYS[1])
    assert run_json("verify", url)["chunks"] == 5
    keyring.write_text(KEYS[0])
    assert len(run_json("verify", url, code=1)["unopenable"]) == 5
    assert run_json("repair", url, "--drop-unopenable")["deleted"] == 5


def test_export_and_import(folder: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "kv.tar", tmp_path / "other"
    assert run_json("export", folder, file) == {"exported": 5, "bytes": 5 * SIZE, "vanished": 0, "corrupt": []}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run_json("import", file, other)["imported"] == 5
    with open_store(str(other)) as store:
        assert read(store, key_of(3)) == chunk_of(3)
    code, out, _ = run("import", file, other)
    assert (code, "5 present" in out) == (0, True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_export_that_fails_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.tar"
    file.write_text("last week's")
    (folder / "chunks" / "00").mkdir(exist_ok=True)
    run("export", folder / "absent", file)
    assert file.read_text() == "last week's"
    code, _, err = run("export", folder, tmp_path / "absent" / "kv.tar")
    assert (code, "cannot write" in err) == (1, True)
    damage(folder, 0)
    assert [one["key"] for one in run_json("export", folder, file, code=1)["corrupt"]] == [key_of(0).hex()]


def test_through_a_pipe(folder: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'from cakekv.cli.main import main; main()' store"
    script = f'{command} export "{folder}" - | {command} import - "{tmp_path / "other"}"'
    subprocess.run(script, shell=True, check=True, capture_output=True, timeout=120)
    assert run_json("stats", tmp_path / "other")["chunks"] == 5
    assert run("export", folder, "-", "--json")[0] == 2


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kv.tar"
    file.write_bytes(os.urandom(5000))
    code, _, err = run("import", file, tmp_path / "other")
    assert (code, "not an archive" in err) == (2, True)
    assert run("import", tmp_path / "absent.tar", tmp_path / "other")[0] == 2


def test_warm(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    tiers = ("memory://", f"{tmp_path / 'front'}?capacity={3 * SIZE}", str(folder))
    file.write_text("".join(f'[[tier]]\nurl = "{url}"\n' for url in tiers))
    url = f"tiered://{file}"
    assert run_json("warm", url, key_of(0).hex()[:8])[0]["copied"] == 1
    disk, memory = run_json("warm", url)
    assert (disk["tier"], disk["copied"], memory["tier"], memory["copied"]) == ("disk", 2, "memory", 0)
    assert "process" in memory["note"]
    with DiskStore(tmp_path / "front") as front:
        assert {chunk.key for chunk in front} == {key_of(0), key_of(3), key_of(4)}
    tokens = tmp_path / "tokens"
    tokens.write_text(" ".join(map(str, range(200))))
    assert run("warm", url, "--tokens", tokens, key_of(0).hex())[0] == 2
    assert run("warm", folder)[0] == 2


# What is no chunk, and what cannot be reached


@pytest.fixture
def redis_url(tmp_path: Path, shared: Any) -> str:
    """Four chunks in a real server, and a list under the name of a fifth."""
    url = f"redis://127.0.0.1:{shared.valkey}?prefix={quote(str(tmp_path), safe='')}:"
    with open_store(url) as store:
        for number in range(4):
            store.write(key_of(number), chunk_of(number))
        redis.Redis(port=shared.valkey).rpush(part_of(store, RedisStore).name_of(key_of(4)), "a list")
    return url


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["stats"], 1, "4 chunks"),
        (["ls"], 1, key_of(3).hex()[:16]),
        (["verify"], 1, "5 chunks, 1 corrupt"),
        (["gc", "--older-than", "1h"], 0, "Deleted 0 old"),
        (["gc", "--capacity", "1B"], 0, "Deleted 0 old and 4 surplus"),
        (["rm", "--all"], 0, "5 chunks deleted"),
        (["rm", key_of(4).hex()], 0, "1 chunks deleted"),
        (["rm", key_of(0).hex()], 0, "1 chunks deleted"),
    ],
)
def test_commands_get_past_what_is_no_chunk(redis_url: str, command: list[str], code: int, said: str) -> None:
    found, out, err = run(command[0], redis_url, *command[1:])
    assert found == code, out + err
    assert said in out
    if code:
        assert key_of(4).hex() in out + err


def test_moving_gets_past_what_is_no_chunk(redis_url: str, tmp_path: Path) -> None:
    for command, target in (("cp", tmp_path / "copy"), ("export", tmp_path / "kv.tar")):
        code, out, err = run(command, redis_url, target)
        assert (code, "4 chunks" in out) == (1, True), out + err
        assert key_of(4).hex() in out + err
    assert run("migrate", redis_url)[0] == 0
    assert DiskStore(tmp_path / "copy").stats().chunks == 4
    assert run_json("repair", redis_url)["deleted"] == 1
    assert run("verify", redis_url)[0] == 0


def test_commands_do_what_they_can_when_a_tier_is_away(tmp_path: Path, folder: Path) -> None:
    config = tmp_path / "kv.toml"
    config.write_text(f"""
        [[tier]]
        url = "file://{quote(str(folder))}"
        [[tier]]
        url = "redis://127.0.0.1:{free_port()}"
    """)
    url = f"tiered://{config}"
    for command in (["stats"], ["ls"], ["gc", "--older-than", "1h"], ["rm", "--all"]):
        code, out, err = run(command[0], url, *command[1:])
        assert code == 1, out + err
        assert "redis tier" in err
    assert DiskStore(folder).stats().chunks == 0


def test_a_store_that_is_wholly_away_is_an_error_at_once() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    for command in (["stats"], ["ls"], ["verify"], ["gc", "--older-than", "1h"], ["rm", "--all"]):
        code, _, err = run(command[0], url, *command[1:])
        assert (code, "See whether the server runs" in err) == (1, True)


def test_a_killed_export_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    command: list[str | Path] = [
        Path(sys.executable).with_name("cakekv"),
        "store",
        "export",
        f"{folder}?bandwidth=10KB/s",
    ]
    target = tmp_path / "out" / "kv.tar"
    target.parent.mkdir()
    (target.parent / f".kv.tar.{1 << 30}").write_text("what a version before left")
    process = subprocess.Popen([*command, target], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (target.parent / f".kv.tar.{1 << 30}").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(target.parent.iterdir()) == []


def test_an_export_without_nameless_files(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    target = tmp_path / "out" / "kv.tar"
    target.parent.mkdir()
    assert run("export", folder, target)[0] == 0
    assert [file.name for file in target.parent.iterdir()] == ["kv.tar"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_forms_on_the_way(tmp_path: Path) -> None:
    """Copies, migrations and archives keep the bits, and take the form that the store they go to asks for."""
    raw = [packable_chunk_of(number) for number in range(3)]
    with open_store(f"{tmp_path}/raw?pack=no") as store:
        for number, chunk in enumerate(raw):
            store.write(key_of(number), chunk)

    def held(folder: str) -> list[bytes]:
        with DiskStore(tmp_path / folder) as store:
            return [read(store, key_of(number)) for number in range(3)]

    assert run_json("cp", tmp_path / "raw", f"{tmp_path}/packed?pack=yes")["copied"] == 3
    assert run_json("stats", tmp_path / "packed")["packed"]["chunks"] == 3
    assert [unpack_chunk(memoryview(bytearray(chunk))) for chunk in held("packed")] == raw
    run("export", tmp_path / "packed", tmp_path / "kv.tar")
    run("import", tmp_path / "kv.tar", f"{tmp_path}/there?pack=yes")
    assert held("there") == held("packed")
    run("import", tmp_path / "kv.tar", f"{tmp_path}/elsewhere?pack=no")
    assert held("elsewhere") == raw
    assert run_json("cp", tmp_path / "packed", f"{tmp_path}/again?pack=no")["copied"] == 3
    assert held("again") == raw
    assert run_json("migrate", f"{tmp_path}/again?pack=yes", "--dry-run")["packed"] == 3
    assert held("again") == raw
    code, out, _ = run("migrate", f"{tmp_path}/again?pack=yes")
    assert (code, "3 packed" in out) == (0, True)
    assert held("again") == held("packed")
    assert run_json("migrate", f"{tmp_path}/again?pack=no")["unpacked"] == 3
    assert held("again") == raw
