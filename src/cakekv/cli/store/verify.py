"""cakekv store verify | repair"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import typer

from cakekv.cli.console import EXIT_FAILED, NEWS, print_json
from cakekv.cli.store.opened import Json, Url, bar, opened, say, say_corrupt
from cakekv.errors import StoreError
from cakekv.store.base import Store
from cakekv.store.maintenance import verify as library
from cakekv.store.maintenance.verify import Condition
from cakekv.store.maintenance.walking import separate_tiers


def verify(store: Url, as_json: Json = False) -> None:
    """Read every chunk and check every byte of it; change nothing.

    Exit code 1 if a chunk is corrupt, or could not be checked. Nothing depends on this: a corrupt chunk is found when
    it is loaded, too, and computed instead. Of a tiered store each tier is verified.

    Examples:

        cakekv store verify out/demo-store

        cakekv store verify "/var/cache/kv?encrypt=kv.keys" --json
    """
    with opened(store) as found, bar("verifying", _bytes(found)) as on_bytes:
        conditions = library.verify(found, on_bytes)
    if as_json:
        print_json(_as_json(conditions))
    else:
        for condition in conditions:
            _show(condition, named=len(conditions) > 1)
    if any(one.corrupt or one.unreadable or one.unopenable or one.error for one in conditions):
        raise typer.Exit(EXIT_FAILED)


def repair(
    store: Url,
    drop_unopenable: Annotated[
        bool, typer.Option("--drop-unopenable", help="Also delete chunks that are sealed with keys not given.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete what cannot be trusted, and what writers left behind that died.

    Every chunk is read, as by verify. On disk, temporary files without a living writer, notes that are damaged or half
    written and empty folders go, and the chunks are counted anew; files that this program does not make are named and
    left alone. A store may be in use meanwhile. Exit code 1 if a tier of a tiered store, or a chunk,
    could not be read or not be deleted.

    Examples:

        cakekv store repair /var/cache/kv

        cakekv store repair "redis://kv.example?encrypt=kv.keys" --drop-unopenable
    """
    with opened(store) as found, bar("verifying", _bytes(found)) as on_bytes:
        repairs = library.repair(found, on_bytes, drop_unopenable=drop_unopenable)
    conditions = [done.found for done in repairs]
    if as_json:
        tidied = [sentence for done in repairs for sentence in done.tidied]
        print_json(_as_json(conditions) | {"deleted": sum(done.deleted for done in repairs), "tidied": tidied})
    else:
        for done in repairs:
            _show(done.found, named=len(repairs) > 1)
            for sentence in [*done.tidied, *([f"Deleted {done.deleted:,} chunk(s)."] if done.deleted else [])]:
                say(sentence)
    if any(condition.error or condition.unreadable for condition in conditions):
        raise typer.Exit(EXIT_FAILED)


def _bytes(store: Store) -> int:
    total = 0
    for tier in separate_tiers(store):
        with suppress(StoreError):  # which is said later
            total += tier.stats().bytes
    return total


def _show(condition: Condition, *, named: bool) -> None:
    say_corrupt(condition.corrupt | condition.unreadable)
    for key in condition.unopenable:
        say(f"{key.hex()}: sealed with a key that is not in the keyring")
    unreadable = f", {len(condition.unreadable):,} could not be read" if condition.unreadable else ""
    unopenable = f", {len(condition.unopenable):,} cannot be opened" if condition.unopenable else ""
    tier = f"{condition.tier}: " if named else ""
    say(f"{tier}{condition.chunks:,} chunks, {len(condition.corrupt):,} corrupt{unreadable}{unopenable}")
    if condition.error is not None:
        NEWS.print(f"The {condition.tier} tier: {condition.error}", style="yellow")


def _as_json(conditions: list[Condition]) -> dict[str, Any]:
    unreadable = [
        {"tier": one.tier, "key": key.hex(), "reason": reason}
        for one in conditions
        for key, reason in one.unreadable.items()
    ]
    plain: dict[str, Any] = {"unreadable": unreadable} if unreadable else {}
    return plain | {
        "chunks": sum(one.chunks for one in conditions),
        "bytes": sum(one.bytes for one in conditions),
        "corrupt": [
            {"tier": one.tier, "key": key.hex(), "reason": reason}
            for one in conditions
            for key, reason in one.corrupt.items()
        ],
        "unopenable": [{"tier": one.tier, "key": key.hex()} for one in conditions for key in one.unopenable],
        "vanished": sum(one.vanished for one in conditions),
        "failed": [{"tier": one.tier, "error": one.error} for one in conditions if one.error is not None],
    }
