"""Servers that are measured end with who measures, in whatever way that ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

STARTER = """
import signal, sys, time
from pathlib import Path
from cakekv.bench.vllm.process import ServerProcess

class Sleeper(ServerProcess):
    log = Path(sys.argv[1])
    stop_signal = signal.SIGTERM
    stop_s = 5.0

    def _command(self):
        return ["sleep", "600"], {}

    def _wait_until_healthy(self):
        pass

with Sleeper() as server:
    print(server._process.pid, flush=True)
    if sys.argv[2] == "waits":
        time.sleep(600)
"""


def is_there(pid: int) -> bool:
    """Whether a process lives; one whose parent has not asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
@pytest.mark.parametrize("end", ["block", "kill"])
def test_a_server_ends_with_its_parent(tmp_path: Path, end: str) -> None:
    waits = "waits" if end == "kill" else "ends"
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "log"), waits], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    server = int(starter.stdout.readline())
    if end == "kill":
        wait_until(lambda: Path(f"/proc/{server}/comm").read_text() == "sleep\n")  # setpriv is through
        os.kill(starter.pid, signal.SIGKILL)
    starter.communicate(timeout=60)
    wait_until(lambda: not is_there(server))
