"""cakekv store rm | gc"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from cakekv.cli.console import NEWS, print_json
from cakekv.cli.store.opened import DryRun, Json, Url, bar, opened, say
from cakekv.errors import BadInput, NotDeleted
from cakekv.quantities import format_bytes, parse_bytes, parse_duration
from cakekv.store.base import Store, StoredChunk
from cakekv.store.eviction import policy_named
from cakekv.store.maintenance.collect import delete, garbage
from cakekv.store.maintenance.walking import OnBytes, chosen, unwrapped


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
    if bool(prefixes) == everything:
        raise BadInput("name the chunks to delete by the beginnings of their keys, or give --all for all of them")
    chosen([], prefixes or [])
    with opened(store) as found:
        held = unwrapped(found)
        chunks = list(held) if everything else chosen(held, prefixes or [])
        with bar("deleting", sum(chunk.size for chunk in chunks)) as on_bytes:
            deleted, trouble = _deleted(held, chunks, on_bytes)
    if as_json:
        print_json({"deleted": deleted})
    else:
        say(f"{deleted:,} chunks deleted")
    if trouble is not None:
        raise trouble


def gc(
    store: Url,
    capacity: Annotated[str | None, typer.Option(help='Delete until this is left, such as "5GB".')] = None,
    older_than: Annotated[
        str | None, typer.Option(help='Delete what was last used longer ago than this, such as "30d" or "12h".')
    ] = None,
    evict: Annotated[
        str | None,
        typer.Option(help="What goes first for --capacity: lru, lfu, keep_the_tail. [default: as the store evicts]"),
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
        deleted, trouble = 0, None
        if chunks and not dry_run:
            with bar("deleting", size) as on_bytes:
                deleted, trouble = _deleted(unwrapped(found), chunks, on_bytes)
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
        if trouble is not None:
            raise trouble
        return
    if age_s is not None and going.undated:
        say(
            f"{going.undated:,} chunks do not count as old: this store does not know when they were used, or has it in "
            "the future, which `cakekv store repair` sets right on disk."
        )
    what = f"{len(going.old):,} old and {len(going.surplus):,} surplus chunks, {format_bytes(size)}"
    if trouble is not None:
        say(f"Of {what}, {deleted:,} were deleted.")
        raise trouble
    say(f"{'Would delete' if dry_run else 'Deleted'} {what}; {format_bytes(going.kept_bytes)} stay.")
    if not dry_run and deleted < len(chunks):
        say(f"{len(chunks) - deleted:,} of them were gone already.")


def _deleted(store: Store, chunks: Sequence[StoredChunk], on_bytes: OnBytes) -> tuple[int, NotDeleted | None]:
    """How many chunks were deleted, and what is to be said of those that cannot be."""
    try:
        return delete(store, chunks, on_bytes), None
    except NotDeleted as error:
        return error.deleted, error
