"""cakekv store rm | gc"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from cakekv.cli.console import EXIT_FAILED, NEWS, one_of, print_json
from cakekv.cli.store.opened import DryRun, Json, Url, bar, opened, say, say_left_out
from cakekv.errors import BadInput, NotDeleted
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes, parse_bytes, parse_duration
from cakekv.store.base import Store, StoredChunk
from cakekv.store.eviction import POLICIES, policy_named
from cakekv.store.maintenance.collect import Garbage, delete, garbage
from cakekv.store.maintenance.listing import listing
from cakekv.store.maintenance.walking import chosen, unwrapped


def rm(
    store: Url,
    prefixes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY…", help="Keys, or beginnings of keys, in hexadecimal.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all chunks.")] = False,
    as_json: Json = False,
) -> None:
    """Delete chunks from a store. What is deleted is computed afresh when it is needed.

    Exit code 1 if something could not be deleted, or not be listed; that is named, and all else is deleted.

    Examples:

        cakekv store rm out/demo-store 1f3a9c 77e0

        cakekv store rm out/demo-store --all
    """
    if bool(prefixes) == everything:
        raise BadInput("name the chunks to delete by the beginnings of their keys, or give --all for all of them")
    chosen([], prefixes or [])
    with opened(store) as found:
        held = unwrapped(found)
        chunks, troubles = listing(held)
        if not everything:
            chunks = chosen(chunks, prefixes or [])
        deleted, left = _deleted(held, chunks, troubles)
    if as_json:
        print_json({"deleted": deleted})
    else:
        say(f"{deleted:,} chunks deleted")
    if say_left_out(troubles, left):
        raise typer.Exit(EXIT_FAILED)


def _deleted(store: Store, chunks: Sequence[StoredChunk], troubles: list[str]) -> tuple[int, dict[ChunkKey, str]]:
    """Delete chunks. Returns how many there were, and those that could not be deleted; adds what else went wrong."""
    try:
        with bar("deleting", sum(chunk.size for chunk in chunks)) as on_bytes:
            return delete(store, chunks, on_bytes), {}
    except NotDeleted as error:
        if not error.left:
            troubles.append(str(error))
        return error.deleted, error.left


def gc(
    store: Url,
    capacity: Annotated[str | None, typer.Option(help='Delete until this is left, such as "5GB".')] = None,
    older_than: Annotated[
        str | None, typer.Option(help='Delete what was last used longer ago than this, such as "30d" or "12h".')
    ] = None,
    evict: Annotated[
        str | None,
        typer.Option(help=f"What goes first for --capacity: {one_of(POLICIES)}. [default: as the store evicts]"),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Delete what is of least use: down to a size, or all that was not used for a time.

    Object stores know only when a chunk was written, and Redis nothing if its policy is LFU: chunks whose time is not
    known do not count as old. A tiered store's chunks count once, and go from all of its tiers; give a tier's own URL
    to clean it alone. Which model a chunk belongs to cannot be told from it: chunks of models that are not used any
    more are those that grow old.

    Examples:

        cakekv store gc /var/cache/kv --capacity 5GB

        cakekv store gc s3://bucket/kv --older-than 30d --dry-run
    """
    if capacity is None and older_than is None:
        raise BadInput("say what is to go: --capacity 5GB deletes down to a size, --older-than 30d what is not used")
    limit = None if capacity is None else parse_bytes(capacity)
    age_s = None if older_than is None else parse_duration(older_than)
    policy = None if evict is None else policy_named(evict)
    with opened(store) as found:
        with NEWS.status("Listing the chunks …"):
            going = garbage(found, time.time(), capacity=limit, older_than_s=age_s, policy=policy)
        chunks = [*going.old, *going.surplus]
        size = sum(chunk.size for chunk in chunks)
        deleted, left, troubles = 0, dict[ChunkKey, str](), list(going.troubles)
        if chunks and not dry_run:
            deleted, left = _deleted(unwrapped(found), chunks, troubles)
    if as_json:
        print_json(
            {
                "old": len(going.old),
                "surplus": len(going.surplus),
                "bytes": size,
                "kept_bytes": going.kept_bytes,
                "undated": going.undated,
                "deleted": deleted,
            }
        )
    else:
        _say_collected(going, deleted, incomplete=bool(left or troubles), older=age_s is not None, dry_run=dry_run)
    if say_left_out(troubles, left):
        raise typer.Exit(EXIT_FAILED)


def _say_collected(going: Garbage, deleted: int, *, incomplete: bool, older: bool, dry_run: bool) -> None:
    chunks = [*going.old, *going.surplus]
    size = sum(chunk.size for chunk in chunks)
    if older and going.undated:
        say(
            f"{going.undated:,} chunks do not count as old: this store does not know when they were used, or has it in "
            "the future, which `cakekv store repair` sets right on disk."
        )
    what = f"{len(going.old):,} old and {len(going.surplus):,} surplus chunks, {format_bytes(size)}"
    if not dry_run and incomplete:
        say(f"Of {what}, {deleted:,} were deleted.")
        return
    say(f"{'Would delete' if dry_run else 'Deleted'} {what}; {format_bytes(going.kept_bytes)} stay.")
    if not dry_run and deleted < len(chunks):
        say(f"{len(chunks) - deleted:,} of them were gone already.")
