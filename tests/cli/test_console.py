"""What commands print: text and nothing else, in tables that are whole; and what they refuse."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cakekv.cli.console import InertConsole
from cakekv.cli.main import app
from cakekv.messages import inert, json_text
from cakekv.store.disk import DiskStore
from cakekv.store.identities import encode_note
from cakekv.store.maintenance import archive
from tests.store.chunks import chunk_of, key_of

ROOT = "ab" * 32
HOSTILE = {
    "title": "\x1b]0;pwned\x07",
    "clear": "\x1b[2J\x1b[31m",
    "csi": "\x9b2J",
    "markup": "[/b]",
    "[/b]": "name",
    "[bold red]name[/]": "x",
    "link": "[link=https://evil.example]click[/link]",
    "emoji": ":skull:",
    "lines": "one\r\ntwo\nthree\x85four\u2028five",
    "turned": "\u202egnp.exe",
    "half": "\ud800",
}
"""What the notes of a stranger's archive may hold."""


def hostile_archive(folder: Path, fields: dict[str, str]) -> Path:
    stream = io.BytesIO()
    archive._write(stream, archive.MARKER, memoryview(archive._marker()))
    archive._write(stream, f"identities/{ROOT}.json", memoryview(encode_note(ROOT, fields).encode()))
    stream.write(archive._END)
    (folder / "kv.tar").write_bytes(stream.getvalue())
    return folder / "kv.tar"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def is_inert(text: str) -> bool:
    return inert(text, line_breaks=True) == text


def on_a_terminal(*arguments: object) -> str:
    """What a command shows on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    code = "from cakekv.cli.main import main; main()"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=theirs, stderr=theirs, env=environment
    ) as command:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
        assert command.wait() == 0
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize("name", HOSTILE)
def test_notes_of_a_stranger_are_text(tmp_path: Path, name: str) -> None:
    file = hostile_archive(tmp_path, {name: HOSTILE[name]})
    assert run("store", "import", file, tmp_path / "kv")[0] == 0
    code, out = run("store", "stats", tmp_path / "kv")
    assert (code, is_inert(out)) == (0, True)
    for text in (name, HOSTILE[name]):
        if text.isprintable():
            assert text in out, "it is shown as it is, whatever it looks like"
    code, out = run("store", "stats", tmp_path / "kv", "--json")
    assert is_inert(out)
    assert json.loads(out)["identities"][ROOT] == {name: HOSTILE[name]}, "data come through as they are"


def test_notes_of_a_stranger_are_text_where_a_prompt_is_explained(tmp_path: Path) -> None:
    run("store", "import", hostile_archive(tmp_path, {"chunk_tokens": "4", **HOSTILE}), tmp_path / "kv")
    (tmp_path / "tokens").write_text("1 2 3 4 5")
    code, out = run("store", "explain", tmp_path / "kv", "--tokens", tmp_path / "tokens", "--identity", ROOT[:8])
    assert (code, is_inert(out)) == (0, True)


def test_a_terminal_is_told_nothing_by_a_note(tmp_path: Path) -> None:
    run("store", "import", hostile_archive(tmp_path, HOSTILE), tmp_path / "kv")
    shown = on_a_terminal("store", "stats", tmp_path / "kv")
    assert "pwned" in shown
    for told in ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "https://evil.example\x1b"):
        assert told not in shown


def test_names_in_a_folder_are_text(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "kv") as store:
        store.write(key_of(0), chunk_of(0))
    (tmp_path / "kv" / "\x1b[2J[b]").touch()
    code, out = run("store", "repair", tmp_path / "kv")
    assert (code, is_inert(out), "[b]" in out) == (0, True, True)
    other = tmp_path / "\x1b]0;x\x07"
    other.mkdir()
    (other / "[bold]thesis").touch()
    code, out = run("store", "stats", other)
    assert (code, is_inert(out), "[bold]thesis" in out) == (1, True, True)


def test_tables_in_a_file_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = "-".join(f"{number:03}" for number in range(45))
    with DiskStore(tmp_path / "kv") as store:
        store.remember_identity(ROOT, {"weights": value})
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out = run("store", "stats", tmp_path / "kv")
    assert any("weights" in line and value in line for line in out.splitlines())
    assert max(map(len, out.splitlines())) < 260, "and no wider than they have to be"
    monkeypatch.setenv("COLUMNS", "60")
    _, out = run("store", "stats", tmp_path / "kv")
    assert max(map(len, out.splitlines())) <= 60


def test_a_terminal_gets_its_own_width(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "kv") as store:
        store.remember_identity(ROOT, {"weights": "-".join(map(str, range(60)))})
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal("store", "stats", tmp_path / "kv"))
    assert max(map(len, shown.splitlines())) == 80


def test_a_line_of_text_may_hold_anything() -> None:
    console = InertConsole()
    with console.capture() as captured:
        console.print("[/b] [red]x[/] :skull: 12 \x1b[2J")
    assert captured.get() == "[/b] [red]x[/] :skull: 12 \ufffd[2J\n"


def test_json_is_inert_and_comes_back_as_it_was() -> None:
    text = json_text(HOSTILE, indent=2)
    assert is_inert(text)
    assert json.loads(text) == HOSTILE


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
@pytest.mark.parametrize("rest", [["nonsense"], ["zsh"], ["store"]])
def test_completion_takes_no_value(option: str, rest: list[str], tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    result = CliRunner(env=environment).invoke(app, [option, *rest])
    assert result.exit_code == 2
    assert "takes no value" in result.output
    assert list(tmp_path.iterdir()) == [], "nothing was installed"
