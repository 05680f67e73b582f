"""cakekv store cp | migrate"""

from __future__ import annotations

from typing import Annotated

import typer

from cakekv.cli.console import EXIT_FAILED, print_json
from cakekv.cli.store.opened import (
    DryRun,
    Json,
    Url,
    bar,
    corrupt_json,
    counted,
    opened,
    say,
    say_corrupt,
    say_left_out,
)
from cakekv.quantities import format_bytes, parse_bytes
from cakekv.store.maintenance.copying import copy
from cakekv.store.maintenance.listing import listing
from cakekv.store.maintenance.migrate import MOVED, RESEALED
from cakekv.store.maintenance.migrate import migrate as migrate_store
from cakekv.store.maintenance.walking import chosen, newest


def cp(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The store to copy from.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The store to copy to; a folder is made.")],
    prefixes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]…", help="Keys, or beginnings of keys. [default: all chunks]")
    ] = None,
    limit_bytes: Annotated[
        str | None, typer.Option(help='Copy no more than this, such as "5GB", of what was used last.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy chunks from one store to another, of whatever kind, each verified in passing.

    What is there already is passed over, so an interrupted copy can be repeated. Of what does not fit the other store's
    capacity, or the limit, the chunks used last are copied. Encryption is each store's own: with ?encrypt= at one of
    the two, chunks are opened or sealed on the way. So is packing: the other store has them packed or not as its
    ?pack= says. Exit code 1 if chunks were corrupt, or could not be opened, read or
    written.

    Examples:

        cakekv store cp /var/cache/kv redis://kv.example --limit-bytes 5GB

        cakekv store cp /var/cache/kv "/mnt/backup/kv?encrypt=kv.keys"

        cakekv store cp s3://bucket/kv /var/cache/kv 1f3a9c 77e0
    """
    limit = None if limit_bytes is None else parse_bytes(limit_bytes)
    chosen([], prefixes or [])
    with opened(source) as former, opened(target, make=True) as latter:
        chunks, troubles = listing(former)
        chunks = chosen(chunks, prefixes) if prefixes else chunks
        capacity = limit if limit is not None else latter.stats().capacity
        with bar("copying", sum(chunk.size for chunk in newest(chunks, capacity))) as on_bytes:
            copied = copy(former, latter, chunks, limit_bytes=limit, on_bytes=on_bytes)
    fates = {name: getattr(copied, name) for name in ("present", "declined", "vanished")}
    if as_json:
        corrupt = corrupt_json(copied.corrupt)
        print_json({"copied": copied.chunks, "bytes": copied.bytes, **fates, "corrupt": corrupt})
    else:
        say_corrupt(copied.corrupt)
        others = counted(**fates, corrupt=len(copied.corrupt), failed=len(copied.failed))
        say(f"{copied.chunks:,} chunks copied, {format_bytes(copied.bytes)}; besides: {others}")
    if say_left_out([*troubles, *copied.troubles], copied.failed) or copied.corrupt:
        raise typer.Exit(EXIT_FAILED)


def migrate(store: Url, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Rewrite what a store holds under former options: older encryption keys, none at all, fewer folders, not packed.

    With ?encrypt=, chunks that are sealed with another key than the newest, or lie in the open, are sealed anew; once
    nothing is left to do, the older keys may go from the file. With ?stripe=, chunks are moved to the folders in which
    they are looked for, after a folder was added at the end. With ?pack=yes, chunks are packed without loss that were
    not, and with ?pack=no unpacked. Exit code 1 if chunks were corrupt, or could not be opened, read or written.

    Examples:

        cakekv store migrate "/var/cache/kv?encrypt=kv.keys" --dry-run

        cakekv store migrate "/a/kv?stripe=/b/kv,/c/kv"

        cakekv store migrate "redis://kv.example?pack=yes"
    """
    with opened(store) as found, bar("migrating", None) as on_bytes:
        migrated = migrate_store(found, on_bytes, dry_run=dry_run)
    fates = {MOVED: 0, RESEALED: 0} | migrated.fates
    if as_json:
        print_json({**fates, "corrupt": corrupt_json(migrated.corrupt)})
    else:
        say_corrupt(migrated.corrupt)
        others = counted(**fates, corrupt=len(migrated.corrupt), failed=len(migrated.failed))
        say(f"{'To do: ' if dry_run else ''}{others}")
    if say_left_out(migrated.troubles, migrated.failed) or migrated.corrupt:
        raise typer.Exit(EXIT_FAILED)
