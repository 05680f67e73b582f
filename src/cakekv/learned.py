"""Files with what was learned of a model, once: sealed with a checksum, and checked before they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from cakekv.errors import BadInput

Read = TypeVar("Read")

_DIGEST = 32


def sealed(mark: bytes, body: bytes) -> bytes:
    """A file's bytes: a mark that says what it is, and in which version; the checksum of the body; the body."""
    return mark + blake3(body).digest() + body


def unsealed(mark: bytes, data: bytes, otherwise: str) -> bytes:
    """The body of what `sealed` wrote.

    Raises
    ------
    BadInput
        It is damaged; or it has another mark, and the message is `otherwise`.
    """
    if data[: len(mark)] != mark:
        raise BadInput(otherwise)
    digest, body = data[len(mark) : len(mark) + _DIGEST], data[len(mark) + _DIGEST :]
    if blake3(body).digest() != digest:
        raise BadInput("its checksum is wrong")
    return body


def read_learned(file: Path, most_bytes: int, read: Callable[[bytes], Read], what: str, advice: str) -> Read:
    """What is in a file.

    Parameters
    ----------
    file : Path
        The file.
    most_bytes : int
        A longer one is not read.
    read : callable
        Takes its bytes; raises `BadInput` if they are not sound.
    what, advice : str
        For messages: what the file should hold, and what to do if it does not.

    Raises
    ------
    BadInput
        It cannot be read, or is not sound; names the file.
    """
    try:
        if not file.is_file() or file.stat().st_size > most_bytes:
            raise BadInput("it is no file, or far too long")
        return read(file.read_bytes())
    except (BadInput, OSError) as error:
        raise BadInput(f"the {what} {file} cannot be used: {error}; {advice}") from error
