"""Writes files and folders that are there whole after a crash, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cakekv.store.ownership import Ownership


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` (format "B") to an open file."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_file(file: Path, text: str, ownership: Ownership) -> None:
    """Write a small file by way of a second one, `file` + ".new"; no two callers may do so at once."""
    temporary = file.with_name(f"{file.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        ownership.give(descriptor)
        write_all(descriptor, memoryview(text.encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(file)
    sync_folder(file.parent)


def make_folder(folder: Path, ownership: Ownership) -> None:
    """Make a folder, unless it exists; its parent must."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            ownership.give(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
