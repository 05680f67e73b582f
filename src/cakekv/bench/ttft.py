"""Times to the first token in one file, measured by several programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cakekv.cli.console import write_json


def write_ttft(file: Path, engine: str, points: Sequence[dict[str, Any]]) -> None:
    """Put points into a file's list `ttft`, instead of those of that engine; all else in it stays."""
    data = json.loads(file.read_text()) if file.exists() else {}
    kept = [one for one in data.get("ttft", ()) if one["engine"] != engine]
    write_json(file, {**data, "ttft": [*kept, *points]})
