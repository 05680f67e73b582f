"""Notes on whose chunks a store holds: small, checked, and only there to explain misses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cakekv.errors import BadInput

MAX_NOTE_BYTES = 64 * 1024
"""Length of the largest note that is written or read."""

_ROOT = re.compile(r"[0-9a-f]{64}")


def is_root(name: str) -> bool:
    """Whether a name is an identity's root: 64 hexadecimal digits."""
    return _ROOT.fullmatch(name) is not None


def encode_note(root: str, fields: Mapping[str, str]) -> str:
    """The text of a note.

    Raises
    ------
    BadInput
        `root` is not a digest in hexadecimal, or the fields exceed 64 KiB.
    """
    text = json.dumps(dict(fields))
    if not is_root(root) or len(text) > MAX_NOTE_BYTES:
        raise BadInput(f"an identity has a root of 64 hexadecimal digits and up to {MAX_NOTE_BYTES} bytes of fields")
    return text


def decode_note(data: bytes) -> dict[str, str] | None:
    """The fields in a note; None if it is damaged."""
    try:
        fields = json.loads(data) if len(data) <= MAX_NOTE_BYTES else None
    except (ValueError, RecursionError):
        return None
    if isinstance(fields, dict) and all(isinstance(value, str) for value in fields.values()):
        return fields
    return None


def read_note(file: Path) -> dict[str, str] | None:
    """The fields in a file; None if it cannot be read, or is damaged."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            return decode_note(stream.read(MAX_NOTE_BYTES + 1))
    except OSError:
        return None
