"""Claims about systems, and what was measured, in one file that several programs write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cakekv.bench.machine import describe_run
from cakekv.cli.console import write_json


class Claim(NamedTuple):
    """What a system is said to do, and whether it does."""

    name: str
    """Begins with the system's."""
    claim: str
    measured: Any
    """Whatever JSON can have."""
    holds: bool


def write_systems(file: Path, prefix: str, claims: Sequence[Claim], settings: dict[str, Any], add: str = "") -> None:
    """Put claims into a file's list `systems`, instead of those whose names begin with `prefix`; all else in it stays.

    Parameters
    ----------
    file : Path
        Made if there is none.
    prefix : str
        The system's name.
    claims : sequence of Claim
        All of this system.
    settings : dict
        What it was measured with; it is told together with the command and the machine.
    add : str
        Only claims that are measured anew go; what this run was measured with is told under the prefix and this.
    """
    data = json.loads(file.read_text()) if file.exists() else {}
    strangers = [one.name for one in claims if not one.name.startswith(prefix)]
    if strangers:
        raise ValueError(f"claims of {prefix} are called so: {strangers}")
    gone = {one.name for one in claims}
    kept = [
        one
        for one in data.get("systems", ())
        if one["name"] not in gone and (add or not one["name"].startswith(prefix))
    ]
    systems = sorted([*kept, *(one._asdict() for one in claims)], key=lambda one: one["name"])
    runs = {**data.get("settings", {}), prefix + add: {**describe_run(), **settings}}
    write_json(file, {**data, "settings": dict(sorted(runs.items())), "systems": systems})
