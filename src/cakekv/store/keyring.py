"""Encryption keys: the one that seals, and older ones that still open."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from cakekv.errors import BadInput
from cakekv.messages import learn

KEY_BYTES = 32
ID_BYTES = 8
_MAX_BYTES = 64 * 1024
_KEY = f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}"


class Keyring:
    """Keys by their names. To rotate, put a new key in front; old ones go when nothing is sealed with them any more.

    Parameters
    ----------
    keys : sequence of bytes
        32 bytes each; the first one seals.
    tenant : str
        Secret of a tenant. Keys are derived from it, so that what one tenant sealed no other opens.

    Raises
    ------
    BadInput
        There is no key, or one has another length.
    """

    def __init__(self, keys: Sequence[bytes], tenant: str = "") -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise BadInput(f"a keyring needs at least one key, and each has {KEY_BYTES} bytes")
        own = [blake3(key + tenant.encode(), derive_key_context="cakekv tenant's sealing key").digest() for key in keys]
        self._keys = {blake3(key, derive_key_context="cakekv key name").digest(ID_BYTES): key for key in own}
        self.newest = next(iter(self._keys))
        """Name of the key that seals; 8 bytes."""

    def data_key(self, name: bytes, purpose: bytes) -> bytes | None:
        """A key of 32 bytes for one purpose only; None if there is no key of that name."""
        key = self._keys.get(name)
        return None if key is None else blake3(purpose, key=key).digest()

    def __repr__(self) -> str:
        return f"Keyring of {len(self._keys)}"


def read_keyring(source: str) -> Keyring:
    """The keys in a file, or in a variable of the environment: 64 hexadecimal digits a line, the newest first.

    Parameters
    ----------
    source : str
        A file's path, or `env:NAME`. Lines that begin with # do not count.

    Raises
    ------
    BadInput
        There is no such file or variable, others may read the file, or it holds something else.
    """
    if source.startswith("env:"):
        name = source.removeprefix("env:")
        text = os.environ.get(name)
        if text is None:
            known = name if re.fullmatch("[A-Z][A-Z0-9_]*", name) and not re.fullmatch(_KEY, name) else "such variable"
            raise BadInput(f"there is no {known} in the environment to take keys from; env: is followed by its name")
    else:
        text = _read_private(Path(source))
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or any(not re.fullmatch(_KEY, key) for key in keys):
        raise BadInput(
            f"{source} should hold keys, each a line of {2 * KEY_BYTES} hexadecimal digits, the newest first; "
            "`openssl rand -hex 32` makes one"
        )
    for key in keys:
        learn(key)
    return Keyring([bytes.fromhex(key) for key in keys])


def _read_private(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            if stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077:
                raise BadInput(f"others may read the keys in {file}: chmod 600 it")
            return stream.read(_MAX_BYTES).decode(errors="replace")
    except OSError as error:
        # What is no file may be a key that was given in its place.
        where = f"in {file}" if file.is_absolute() and file.parent.is_dir() else "where encrypt= says that they are"
        raise BadInput(
            f"cannot read the keys {where}: {error.strerror}. Give the path of a file, or env:NAME, never a key itself."
        ) from None
