"""cakekv store stats | ls"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.table import Table

from cakekv.cli.console import EXIT_FAILED, RESULTS, print_json
from cakekv.cli.store.opened import Json, Url, opened, say_left_out
from cakekv.errors import StoreError
from cakekv.quantities import format_bytes, format_time
from cakekv.store.base import StoredChunk, StoreStats
from cakekv.store.maintenance.beside import Beside, beside
from cakekv.store.maintenance.listing import down, listing
from cakekv.store.maintenance.packing import Packing, packing


def stats(store: Url, as_json: Json = False) -> None:
    """Show how many chunks and bytes a store holds, how much packing saves of that, and whose they are.

    What sights keep beside chunks (docs/decode.md) counts among them, and is told apart by its length. Exit code 1 if
    something could not be counted, or bears the name of a chunk and is none; that is named.

    Example:

        cakekv store stats out/demo-store
    """
    with opened(store) as found:
        held = found.stats()
        troubles = [*held.uncounted, *(f"the {one.name} tier is down" for one in down(found))]
        identities: dict[str, dict[str, str]] = {}
        try:
            identities = found.identities()
        except StoreError as error:
            troubles.append(str(error))
        packed, others, pinned = Packing(0, 0, 0), Beside(0, 0), 0
        with suppress(StoreError):  # likewise
            pinned = found.pins().bytes
        with suppress(StoreError):  # which is among the troubles
            chunks = listing(found).chunks
            packed, others = packing(found, chunks), beside(found, chunks, identities)
    if as_json:
        plain = {"chunks": held.chunks, "bytes": held.bytes, "capacity": held.capacity, "identities": identities}
        plain["packed"] = packed._asdict()
        plain |= {"beside": others._asdict()} if others.chunks else {}
        plain |= {"pinned_bytes": pinned} if pinned else {}
        print_json(plain | ({"uncounted": troubles} if troubles else {}))
    else:
        _show(held, packed, others, pinned, identities)
    if say_left_out(troubles):
        raise typer.Exit(EXIT_FAILED)


def _show(
    held: StoreStats, packed: Packing, others: Beside, pinned: int, identities: Mapping[str, Mapping[str, str]]
) -> None:
    capacity = "" if held.capacity is None else f" of {format_bytes(held.capacity)}"
    RESULTS.print(f"{held.chunks:,} chunks, {format_bytes(held.bytes)}{capacity}")
    if packed.chunks:
        saved = format_bytes(packed.unpacked_bytes - packed.bytes)
        RESULTS.print(f"{packed.chunks:,} of them packed, {format_bytes(packed.bytes)}, which saves {saved}")
    if others.chunks:
        RESULTS.print(f"{others.chunks:,} of them, {format_bytes(others.bytes)}, are what sights keep beside chunks")
    if pinned:
        RESULTS.print(f"{format_bytes(pinned)} pinned, stored or not")
    for root, fields in identities.items():
        table = Table("model and settings", root[:12], title_justify="left")
        for name, value in fields.items():
            table.add_row(name, value if len(value) <= 200 else f"{value[:200]}…")
        RESULTS.print(table)


def ls(
    store: Url,
    limit: Annotated[int | None, typer.Option(min=1, help="Show so many chunks only.")] = None,
    as_json: Json = False,
) -> None:
    """List the chunks of a store, last used first.

    Exit code 1 if something could not be listed, or bears the name of a chunk and is none; that is named.

    Example:

        cakekv store ls out/demo-store --limit 20
    """
    with opened(store) as found:
        listed = listing(found)
    chunks = sorted(listed.chunks, key=lambda chunk: chunk.used_at, reverse=True)
    faulty = [chunk for chunk in chunks if chunk.fault]
    shown = [chunk for chunk in chunks if not chunk.fault][:limit]
    if as_json:
        print_json([_as_json(chunk) for chunk in [*shown, *faulty]])
    else:
        _show_chunks(shown, len(chunks) - len(faulty))
    if say_left_out(listed.troubles, {chunk.key: chunk.fault for chunk in faulty}):
        raise typer.Exit(EXIT_FAILED)


def _as_json(chunk: StoredChunk) -> dict[str, Any]:
    plain = {"key": chunk.key.hex(), "size": chunk.size, "used_at": chunk.used_at}
    return plain | ({"fault": chunk.fault} if chunk.fault else {})


def _show_chunks(shown: Sequence[StoredChunk], count: int) -> None:
    table = Table("key", "size", "last used")
    for chunk in shown:
        table.add_row(chunk.key.hex()[:16], format_bytes(chunk.size), format_time(chunk.used_at))
    RESULTS.print(table)
    if len(shown) < count:
        RESULTS.print(f"and {count - len(shown):,} more", style="dim")
