"""cakekv store stats | ls"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from cakekv.cli.console import RESULTS, print_json
from cakekv.cli.store.opened import Json, Url, opened
from cakekv.quantities import format_bytes, format_time


def stats(store: Url, as_json: Json = False) -> None:
    """Show how many chunks and bytes a store holds, and whose they are.

    Example:

        cakekv store stats out/demo-store
    """
    with opened(store) as found:
        held = found.stats()
        identities = found.identities()
    if as_json:
        print_json({**held._asdict(), "identities": identities})
        return
    capacity = "" if held.capacity is None else f" of {format_bytes(held.capacity)}"
    RESULTS.print(f"{held.chunks:,} chunks, {format_bytes(held.bytes)}{capacity}")
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

    Example:

        cakekv store ls out/demo-store --limit 20
    """
    with opened(store) as found:
        chunks = sorted(found, key=lambda chunk: chunk.used_at, reverse=True)
    shown = chunks[:limit]
    if as_json:
        print_json([{**chunk._asdict(), "key": chunk.key.hex()} for chunk in shown])
        return
    table = Table("key", "size", "last used")
    for chunk in shown:
        table.add_row(chunk.key.hex()[:16], format_bytes(chunk.size), format_time(chunk.used_at))
    RESULTS.print(table)
    if len(shown) < len(chunks):
        RESULTS.print(f"and {len(chunks) - len(shown):,} more", style="dim")
