"""Finds what dead processes left in a store's folder, and what never belonged there."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cakekv.store.eviction.base import AHEAD_S
from cakekv.store.folder import CHUNKS, IDENTITIES, INCOMING, LOCK, MARKER, PINS, REMOVALS, UNCOPIED, Counts, Folder
from cakekv.store.identities import is_root, read_note
from cakekv.store.ownership import whose

QUIET_S = 60.0
"""An empty folder that changed within so many seconds may be one that a writer is about to use."""
_NAMED = 10


def clear_leftovers(folder: Folder, counts: Counts) -> list[str]:
    """Remove leftovers, and count the chunks anew. The caller holds the folder's lock.

    Only what bears a name that this program gives, and that no living writer holds, is removed. Other files are named.

    Parameters
    ----------
    folder : Folder
        The store's.
    counts : Counts
        Those that the lock file holds; corrected.

    Returns
    -------
    list of str
        What was found, a sentence each.
    """
    folder.reserved()
    removed = {"temporary file(s) of writers that died": folder.cleared}
    folder.cleared = 0
    notes = list(_unfinished(folder.path)) + list(_damaged_notes(folder.path / IDENTITIES))
    stuck = []
    for file in notes:
        try:
            file.unlink(missing_ok=True)
        except OSError:
            stuck.append(file)
    removed["identity note(s) that were damaged or half written"] = len(notes) - len(stuck)
    removed["empty folder(s)"] = sum(_remove_if_empty(shard) for shard in list(folder.shards()))
    sentences = [f"Removed {number:,} {what}." for what, number in removed.items() if number]

    before = counts.chunks, counts.bytes
    ahead = [chunk.key for chunk in folder.counted(counts) if chunk.used_at > time.time() + AHEAD_S]
    for key in ahead:
        with suppress(OSError):
            os.utime(folder.file(key), follow_symlinks=False)
    if ahead:
        sentences.append(f"Dated {len(ahead):,} chunk(s) from the future to now.")
    if (counts.chunks, counts.bytes) != before:
        sentences.append(f"Corrected the count of chunks from {before[0]:,} to {counts.chunks:,}.")

    stuck += [shard for shard in folder.shards() if not os.access(shard, os.R_OK | os.X_OK)]
    if stuck:
        sentences.append(f"Could not look into or remove {len(stuck):,} thing(s), such as: {whose(stuck[0])}.")
    foreign = [str(path.relative_to(folder.path)) for path in _foreign(folder)]
    if foreign:
        named = ", ".join(map(repr, foreign[:_NAMED])) + (", …" if len(foreign) > _NAMED else "")
        sentences.append(f"Left alone {len(foreign):,} thing(s) that no store puts here: {named}.")
    return sentences


def _unfinished(path: Path) -> Iterator[Path]:
    """Second files of `durable.write_file`, which nobody writes while the lock is held."""
    yield from filter(_is_file, [path / f"{MARKER}.new", path / f"{PINS}.new"])
    for file in (path / IDENTITIES).glob("*.json.new"):
        if is_root(file.name.removesuffix(".json.new")) and _is_file(file):
            yield file


def _damaged_notes(path: Path) -> Iterator[Path]:
    for file in path.glob("*.json"):
        if is_root(file.stem) and _is_file(file) and os.access(file, os.R_OK) and read_note(file) is None:
            yield file


def _remove_if_empty(shard: Path) -> bool:
    with suppress(OSError):
        if time.time() - shard.stat().st_mtime >= QUIET_S:
            shard.rmdir()
            return True
    return False


def _foreign(folder: Folder) -> Iterator[Path]:
    known = {MARKER, LOCK, CHUNKS, INCOMING, IDENTITIES, REMOVALS, f"{REMOVALS}.old", UNCOPIED, PINS}
    known |= {f"{MARKER}.new", f"{PINS}.new"}
    yield from (path for path in folder.path.iterdir() if path.name not in known)
    shards = set(folder.shards())
    for path in (folder.path / CHUNKS).iterdir():
        if path not in shards:
            yield path
    for shard in shards:
        with suppress(PermissionError), os.scandir(shard) as files:
            yield from (Path(file.path) for file in files if not folder.is_chunk(file))
    yield from (path for path in (folder.path / INCOMING).iterdir() if not folder.is_temporary(path.name))
    for path in (folder.path / IDENTITIES).iterdir():
        if path.suffix != ".json" or not is_root(path.stem) or not _is_file(path):
            yield path


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
