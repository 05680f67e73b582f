"""Programs that use cakekv are type-checked against it: `py.typed` is there, and the types of public names hold."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import cakekv

PROGRAM = """
from cakekv import BadInput, Cake, Generation, MemoryStore, RestoreReport, Store, open_store

store: Store = MemoryStore(1 << 20)
with open_store("memory://") as other, Cake.from_pretrained("model", store=[store, other]) as cake:
    try:
        answer: Generation = cake.generate("What is it for?", max_new_tokens=16)
    except BadInput as error:
        print(error)
    report: RestoreReport = answer.report
    tokens: int = report.loaded_tokens
    pieces: list[str] = list(cake.stream("And this?"))
    saved: int = cake.wait_saved().saved_chunks
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where cakekv is installed with NumPy, and nothing else: without torch, a check takes seconds."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "cakekv").symlink_to(Path(str(cakekv.__file__)).parent)
    (packages / "numpy").symlink_to(Path(sysconfig.get_path("platlib")) / "numpy")
    return folder


def check(environment: Path, program: str, folder: Path) -> str:
    """What mypy says."""
    file = folder / "program.py"
    file.write_text(program)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        environment / "bin" / "python",
    ]
    options: list[str | Path] = ["--config-file", "", "--cache-dir", environment / "cache", file]
    done = subprocess.run([*command, *options], cwd=folder, env={}, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


def test_a_program_that_is_right(environment: Path, tmp_path: Path) -> None:
    assert check(environment, PROGRAM, tmp_path).startswith("Success")


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("max_new_tokens=16", 'max_new_tokens="16"', r"\[arg-type\]"),
        ("tokens: int", "tokens: str", r"\[assignment\]"),
        ("MemoryStore, ", "MemoryStore, Pie, ", r'has no attribute "Pie"'),
    ],
)
def test_programs_that_are_wrong(environment: Path, tmp_path: Path, right: str, wrong: str, complaint: str) -> None:
    assert right in PROGRAM
    assert re.search(complaint, check(environment, PROGRAM.replace(right, wrong), tmp_path))
