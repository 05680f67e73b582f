"""Programs of these tests, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = str(Path(__file__).parents[2])


@contextmanager
def running(call: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `call`, such as "tests.faults.killing.main('/tmp', 5)"; killed at the end of the block."""
    module = call.partition("(")[0].rpartition(".")[0]
    changes = {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)])}
    changes["MALLOC_ARENA_MAX"] = "1"  # else each thread that is new may take memory of its own to hold in reserve
    process = subprocess.Popen(
        [sys.executable, "-c", f"import {module}; {call}"],
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def printed(process: subprocess.Popen[str]) -> str:
    """What a process has printed in the end; it must have ended well."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return out
