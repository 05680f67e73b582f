"""How, and on which machine, a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

LIBRARIES = ("cakekv", "torch", "transformers", "numpy")


def describe_run() -> dict[str, Any]:
    """What every file of results begins with: the command line and the machine."""
    program, *arguments = sys.argv
    words = ["python", program] if program.endswith(".py") else [Path(program).name]
    return {"command": shlex.join([*words, *arguments]), "machine": describe_machine()}


def describe_machine() -> dict[str, object]:
    """Processor, cores, system and the versions of what does the work (None: not installed, or no git there)."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(library: str) -> str | None:
    """The version of a package; None: it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):  # run from a source folder
        return importlib.metadata.version(library)
    return None


def _commit() -> str | None:
    """The git commit of the source folder that this runs from, with "-dirty" behind it if files were changed."""
    folder = Path(__file__).parents[3]
    if not (folder / ".git").exists():  # installed; the folder may lie in somebody else's repository
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None
