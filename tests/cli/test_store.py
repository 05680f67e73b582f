from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.store.disk import DiskStore
from cakekv.store.opening import open_store
from tests.store.chunks import PACKABLE, SIZE, chunk_of, key_of, packable_chunk_of


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["store", *(str(argument) for argument in arguments)])
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object, code: int = 0) -> Any:
    exit_code, out, err = run(*arguments, "--json")
    assert exit_code == code, err
    return json.loads(out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of five chunks."""
    folder = tmp_path / "a store"
    with DiskStore(folder) as store:
        for number in range(5):
            store.write(key_of(number), chunk_of(number))
        store.remember_identity("ab" * 32, {"dtype": "bfloat16"})
    return folder


def damage(folder: Path, number: int) -> None:
    path = next(folder.glob(f"chunks/*/{key_of(number).hex()[2:]}.chunk"))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def test_stats(folder: Path) -> None:
    assert run_json("stats", folder) == {
        "chunks": 5,
        "bytes": 5 * SIZE,
        "capacity": None,
        "identities": {"ab" * 32: {"dtype": "bfloat16"}},
        "packed": {"chunks": 0, "bytes": 0, "unpacked_bytes": 0},
    }
    _, out, _ = run("stats", folder)
    assert "5 chunks" in out
    assert "packed" not in out
    assert "bfloat16" in out


def test_what_packing_saves(folder: Path) -> None:
    with open_store(f"{folder}?pack=yes") as store:
        for number in range(5, 8):
            store.write(key_of(number), packable_chunk_of(number))
    stats = run_json("stats", folder)
    assert stats["chunks"] == 8
    assert stats["packed"] == {
        "chunks": 3,
        "bytes": stats["bytes"] - 5 * SIZE,
        "unpacked_bytes": 3 * PACKABLE.total_bytes,
    }
    assert stats["packed"]["bytes"] < 0.9 * stats["packed"]["unpacked_bytes"]
    _, out, _ = run("stats", folder)
    assert "3 of them packed" in out
    assert "which saves" in out
    assert run_json("verify", folder)["chunks"] == 8


def test_ls(folder: Path) -> None:
    listed = run_json("ls", folder)
    assert {chunk["key"] for chunk in listed} == {key_of(number).hex() for number in range(5)}
    assert [chunk["used_at"] for chunk in listed] == sorted((chunk["used_at"] for chunk in listed), reverse=True)
    _, out, _ = run("ls", folder, "--limit", 2)
    assert "and 3 more" in out


def test_verify_finds_what_is_corrupt_and_repair_deletes_it(folder: Path) -> None:
    assert run_json("verify", folder)["corrupt"] == []
    damage(folder, 3)
    found = run_json("verify", folder, code=1)
    assert [(chunk["tier"], chunk["key"]) for chunk in found["corrupt"]] == [("disk", key_of(3).hex())]
    assert "checksum" in found["corrupt"][0]["reason"]
    assert run_json("stats", folder)["chunks"] == 5
    code, out, _ = run("verify", folder)
    assert (code, key_of(3).hex() in out, "1 corrupt" in out) == (1, True, True)
    assert run_json("repair", folder)["deleted"] == 1
    assert run_json("verify", folder) == {
        "chunks": 4,
        "bytes": 4 * SIZE,
        "corrupt": [],
        "unopenable": [],
        "vanished": 0,
        "failed": [],
    }


def test_repair_says_what_it_removed_and_what_it_left_alone(folder: Path) -> None:
    (folder / "incoming" / f"{SIZE}-0123456789abcdef.tmp").write_text("half a chunk")
    (folder / "thesis.txt").write_text("years of work")
    damage(folder, 0)
    code, out, _ = run("repair", folder)
    assert code == 0
    assert "Removed 1 temporary file(s)" in out
    assert "'thesis.txt'" in out
    assert "Deleted 1 chunk(s)." in out
    assert run_json("repair", folder)["tidied"] == ["Left alone 1 thing(s) that no store puts here: 'thesis.txt'."]


def test_looking_does_not_count_as_using(folder: Path) -> None:
    before = run_json("ls", folder)
    for command in ("verify", "repair", "stats"):
        run_json(command, folder)
    run_json("cp", folder, folder.parent / "copy")
    assert run_json("ls", folder) == before


def test_verify_finds_a_sound_chunk_under_anothers_name(folder: Path) -> None:
    with DiskStore(folder) as store:
        store.write(key_of(1), chunk_of(2))
    found = run_json("verify", folder, code=1)
    assert [chunk["key"] for chunk in found["corrupt"]] == [key_of(1).hex()]
    assert "another key" in found["corrupt"][0]["reason"]


def test_rm_by_the_beginning_of_a_key(folder: Path) -> None:
    assert run_json("rm", folder, key_of(0).hex()[:16].upper(), key_of(1).hex()) == {"deleted": 2}
    assert run_json("stats", folder)["chunks"] == 3


def test_rm_all(folder: Path) -> None:
    assert run_json("rm", folder, "--all") == {"deleted": 5}
    assert run_json("stats", folder)["bytes"] == 0


@pytest.mark.parametrize("arguments", [(), ("ab", "--all"), ("xyz",), ("",)])
def test_rm_refuses_to_guess(folder: Path, arguments: tuple[str, ...]) -> None:
    code, _, err = run("rm", folder, *arguments)
    assert code == 2
    assert "error: " in err
    assert run_json("stats", folder)["chunks"] == 5


@pytest.mark.parametrize("command", ["stats", "repair", "migrate"])
@pytest.mark.parametrize("url", ["{}/absent", "file://{}/absent", "memory://", "memory://?capacity=none", "ftp://x"])
def test_no_command_that_looks_makes_a_store(tmp_path: Path, command: str, url: str) -> None:
    code, _, err = run(command, url.format(tmp_path))
    assert code == 2
    assert "error: " in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    code, _, err = run("stats", tmp_path)
    assert code == 1
    assert "error: " in err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_looking_makes_no_store(tmp_path: Path) -> None:
    for command in ("stats", "ls", "verify"):
        code, _, err = run(command, tmp_path)
        assert (code, "there is no store" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []
