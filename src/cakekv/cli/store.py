"""cakekv store stats | ls | verify | rm"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from cakekv.chunk import verify_chunk
from cakekv.cli.console import EXIT_FAILED, NEWS, RESULTS, print_json
from cakekv.errors import BadInput, ChunkFault, CorruptChunk, MissingChunk
from cakekv.quantities import format_bytes
from cakekv.store.base import Store, StoredChunk
from cakekv.store.opening import open_store

app = typer.Typer(
    no_args_is_help=True,
    help="Look into a store: what it holds, whether it is sound; and clear it.\n\n"
    "A store is a folder, or a URL such as file:///var/cache/kv.",
)

Url = Annotated[str, typer.Argument(metavar="STORE", help="A folder, or a URL such as file:///var/cache/kv.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def stats(store: Url, as_json: Json = False) -> None:
    """Show how many chunks and bytes a store holds, and whose they are.

    Example:

        cakekv store stats out/demo-store
    """
    with _opened(store) as opened:
        held = opened.stats()
        identities = opened.identities()
    if as_json:
        print_json({**held._asdict(), "identities": identities})
        return
    capacity = "" if held.capacity is None else f" of {format_bytes(held.capacity)}"
    RESULTS.print(f"{held.chunks:,} chunks, {format_bytes(held.bytes)}{capacity}", highlight=False)
    for root, fields in identities.items():
        table = Table("model and settings", root[:12], title_justify="left")
        for name, value in fields.items():
            table.add_row(name, value if len(value) <= 200 else f"{value[:200]}…")
        RESULTS.print(table)


@app.command()
def ls(
    store: Url,
    limit: Annotated[int | None, typer.Option(min=1, help="Show so many chunks only.")] = None,
    as_json: Json = False,
) -> None:
    """List the chunks of a store, last used first.

    Example:

        cakekv store ls out/demo-store --limit 20
    """
    with _opened(store) as opened:
        chunks = sorted(opened, key=lambda chunk: chunk.used_at, reverse=True)
    shown = chunks[:limit]
    if as_json:
        print_json([{**chunk._asdict(), "key": chunk.key.hex()} for chunk in shown])
        return
    table = Table("key", "size", "last used")
    for chunk in shown:
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(chunk.used_at))
        table.add_row(chunk.key.hex()[:16], format_bytes(chunk.size), used)
    RESULTS.print(table)
    if len(shown) < len(chunks):
        RESULTS.print(f"and {len(chunks) - len(shown):,} more", style="dim")


@app.command()
def verify(
    store: Url,
    delete_corrupt: Annotated[bool, typer.Option("--delete-corrupt", help="Delete the chunks that fail.")] = False,
    as_json: Json = False,
) -> None:
    """Read every chunk and check every byte of it. Exit code 1 if a corrupt one is found and left.

    Nothing depends on this: a corrupt chunk is found when it is loaded, too, and computed instead.

    Example:

        cakekv store verify out/demo-store --delete-corrupt
    """
    corrupt: dict[StoredChunk, str] = {}
    vanished = 0
    with _opened(store) as opened:
        chunks = list(opened)
        with _bar() as progress:
            task = progress.add_task("verifying", total=sum(chunk.size for chunk in chunks))
            for chunk in chunks:
                try:
                    _verify(opened, chunk)
                except CorruptChunk as error:
                    corrupt[chunk] = str(error)
                except MissingChunk:  # evicted or deleted meanwhile
                    vanished += 1
                progress.advance(task, chunk.size)
        deleted = opened.delete([chunk.key for chunk in corrupt]) if delete_corrupt else 0
    if as_json:
        print_json(
            {
                "chunks": len(chunks) - vanished,
                "bytes": sum(chunk.size for chunk in chunks),
                "corrupt": [{"key": chunk.key.hex(), "reason": reason} for chunk, reason in corrupt.items()],
                "vanished": vanished,
                "deleted": deleted,
            }
        )
    else:
        for chunk, reason in corrupt.items():
            RESULTS.print(f"{chunk.key.hex()}: {reason}", highlight=False, markup=False, soft_wrap=True)
        removed = f", {deleted:,} deleted" if deleted else ""
        RESULTS.print(f"{len(chunks) - vanished:,} chunks, {len(corrupt):,} corrupt{removed}", highlight=False)
    if corrupt and not delete_corrupt:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def rm(
    store: Url,
    prefixes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY…", help="Keys, or beginnings of keys, in hexadecimal.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all chunks.")] = False,
    as_json: Json = False,
) -> None:
    """Delete chunks from a store. What is deleted is computed afresh when it is needed.

    Examples:

        cakekv store rm out/demo-store 1f3a9c 77e0

        cakekv store rm out/demo-store --all
    """
    wanted = tuple(prefix.lower() for prefix in prefixes or ())
    if bool(wanted) == everything:
        raise BadInput("name the chunks to delete by the beginnings of their keys, or give --all for all of them")
    for prefix in wanted:
        if not prefix or set(prefix) - set("0123456789abcdef"):
            raise BadInput(f"{prefix!r} is not the beginning of a key: keys are written in hexadecimal")
    with _opened(store) as opened:
        chosen = [chunk for chunk in opened if everything or chunk.key.hex().startswith(wanted)]
        with NEWS.status(f"Deleting {len(chosen):,} chunks …"):
            deleted = opened.delete([chunk.key for chunk in chosen])
    if as_json:
        print_json({"deleted": deleted})
    else:
        RESULTS.print(f"{deleted:,} chunks deleted", highlight=False)


def _verify(store: Store, chunk: StoredChunk) -> None:
    with store.open(chunk.key) as reader:
        buffer = memoryview(bytearray(reader.size))
        header = verify_chunk(buffer[: reader.read_into(buffer, 0)])
    if header.key != chunk.key:
        raise CorruptChunk(ChunkFault.WRONG_KEY, f"it says {header.key.short}…")


@contextmanager
def _opened(url: str) -> Iterator[Store]:
    """Open a store that exists: a mistyped path is an error here, not a new store."""
    place = url.partition("?")[0].removeprefix("file://")
    if "://" not in place and not Path(place).expanduser().is_dir():
        raise BadInput(f"there is no store {place}")
    with open_store(url) as store:
        yield store


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=NEWS)
