"""Drops files from the system's page cache, so that they are read from their device."""

from __future__ import annotations

import os
from pathlib import Path


def forget_chunks(folder: Path, files: str = "*.chunk") -> None:
    """Ask the system to drop the pages of the chunks of a store in a folder from its page cache."""
    for file in folder.rglob(files):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the device yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
