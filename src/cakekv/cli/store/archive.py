"""cakekv store export | import"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import typer

from cakekv.cli.console import EXIT_FAILED, NEWS, print_json
from cakekv.cli.store.opened import Json, Url, bar, corrupt_json, counted, opened, say, say_corrupt, say_left_out
from cakekv.errors import BadInput, CakeError
from cakekv.quantities import format_bytes
from cakekv.store.durable import sync_folder
from cakekv.store.maintenance import archive

File = Annotated[str, typer.Argument(metavar="FILE", help="A file; - for standard output, or input.")]


def export(store: Url, file: File, as_json: Json = False) -> None:
    """Write a store to one portable file: a tar of its chunks and of whose they are.

    Chunks are verified in passing; corrupt or unreadable ones are left out, and the exit code is 1. The file appears
    when it is complete, is readable by you alone, and holds chunks in the open, also those of an encrypted store.

    Examples:

        cakekv store export /var/cache/kv kv.tar

        cakekv store export "/var/cache/kv?encrypt=kv.keys" - | age -r RECIPIENT > kv.tar.age
    """
    if file == "-" and as_json:
        raise BadInput("standard output is taken by the archive: leave out --json, or name a file")
    with opened(store) as found, _written(file) as stream, bar("exporting", found.stats().bytes) as on_bytes:
        exported = archive.export(found, stream, on_bytes)
    if as_json:
        corrupt = corrupt_json(exported.corrupt)
        print_json(
            {"exported": exported.chunks, "bytes": exported.bytes, "vanished": exported.vanished, "corrupt": corrupt}
        )
    elif file == "-":
        others = counted(corrupt=len(exported.corrupt), failed=len(exported.failed))
        NEWS.print(f"{exported.chunks:,} chunks exported; left out: {others}")
    else:
        say_corrupt(exported.corrupt)
        say(f"{exported.chunks:,} chunks exported, {format_bytes(exported.bytes)}")
    if say_left_out(exported.troubles, exported.failed) or exported.corrupt:
        raise typer.Exit(EXIT_FAILED)


def import_(
    file: File,
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store to import to; a folder is made.")],
    as_json: Json = False,
) -> None:
    """Write the chunks of an exported file to a store.

    The file need not be trusted: nothing in it but chunks and notes is accepted, names must be keys, lengths are
    bounded, every byte is checked, and nothing is written but chunks. Checksums find damage, not forgery: import from
    people whom you would let write to the store. Exit code 1 if chunks were corrupt or could not be written, 2 if there
    is something else in the file.

    Examples:

        cakekv store import kv.tar /var/cache/kv

        age -d -i key.txt kv.tar.age | cakekv store import - "/var/cache/kv?encrypt=kv.keys"
    """
    with _read(file) as (stream, size), opened(store, make=True) as found, bar("importing", size) as on_bytes:
        imported = archive.import_archive(stream, found, on_bytes)
    fates = {name: getattr(imported, name) for name in ("present", "declined", "identities")}
    if as_json:
        result: dict[str, Any] = {"imported": imported.chunks, "bytes": imported.bytes, **fates}
        print_json(result | {"corrupt": corrupt_json(imported.corrupt)})
    else:
        say_corrupt(imported.corrupt)
        others = counted(**fates, corrupt=len(imported.corrupt), failed=len(imported.failed))
        say(f"{imported.chunks:,} chunks imported, {format_bytes(imported.bytes)}; besides: {others}")
    if say_left_out([], imported.failed) or imported.corrupt:
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _written(file: str) -> Iterator[BinaryIO]:
    """A private file that appears when it is complete, or standard output."""
    path = Path(file).absolute()
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if file == "-":
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
            return
        _clear_scratch(path)
        descriptor, named = _open_scratch(scratch)
        try:
            with open(descriptor, "wb") as stream:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield stream
                stream.flush()
                os.fsync(descriptor)
                if not named:  # a directory's descriptor is asked for, so that the link is followed; it is not used
                    os.link(f"/proc/self/fd/{descriptor}", scratch, src_dir_fd=descriptor)
                scratch.replace(path)
            sync_folder(path.parent)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise CakeError(f"cannot write {file}: {error.strerror or error}") from error


def _open_scratch(scratch: Path) -> tuple[int, bool]:
    """A private file to write to, and whether it has a name. One without ends with its process, however that ends."""
    with suppress(OSError):  # not every file system has such
        return os.open(scratch.parent, os.O_WRONLY | os.O_TMPFILE, 0o600), False
    return os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), True


def _clear_scratch(path: Path) -> None:
    """Remove what exports to this file left behind that were killed; those at work hold a lock."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"\d+")
    for file in [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]:
        with suppress(OSError), open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


@contextmanager
def _read(file: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A file, or standard input; and its length, if it has one."""
    if file == "-":
        yield cast(BinaryIO, sys.stdin.buffer), None
        return
    try:
        with open(file, "rb") as stream:
            yield stream, os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error
