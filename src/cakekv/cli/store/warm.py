"""cakekv store warm"""

from __future__ import annotations

from typing import Annotated

import typer

from cakekv.cli.console import EXIT_FAILED, print_json
from cakekv.cli.store.opened import Json, bar, counted, opened, say
from cakekv.cli.store.prompt import PromptOptions, about_a_prompt
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes, parse_bytes
from cakekv.store.maintenance.explain import prompt_keys
from cakekv.store.maintenance.walking import chosen
from cakekv.store.maintenance.warm import warm as warm_store


@about_a_prompt
def warm(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A tiered store: tiered:///path/kv.toml.")],
    prefixes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]…", help="Keys, or beginnings of keys. [default: all chunks]")
    ] = None,
    limit: Annotated[
        str | None, typer.Option("--bytes", help="Copy no more than this to each tier. [default: what is free there]")
    ] = None,
    *,
    prompt: PromptOptions,
    as_json: Json = False,
) -> None:
    """Copy chunks to the front of a tiered store before they are asked for, the ones used last first.

    To every tier that takes promotions (promote = true), from all behind it. Memory tiers are passed over: they are
    part of the process that serves. Which chunks: those of a document, those named, or all.

    Examples:

        cakekv store warm tiered:///etc/kv.toml --bytes 20GB

        cakekv store warm tiered:///etc/kv.toml --document contract.txt --model path/to/model
    """
    limit_bytes = None if limit is None else parse_bytes(limit)
    chosen([], prefixes or [])
    with opened(store) as found:
        keys: set[ChunkKey] | None = None
        if prompt.names_one:
            if prefixes:
                raise BadInput("name chunks either by keys or by a document")
            asked = prompt.find(found)
            keys = set(prompt_keys(asked.root, asked.fields, asked.token_ids))
        elif prefixes:
            keys = {chunk.key for chunk in chosen(found, prefixes)}
        with bar("copying", None) as on_bytes:
            warmed = warm_store(found, keys, limit_bytes=limit_bytes, memory=False, on_bytes=on_bytes)
    if as_json:
        print_json(
            [
                {
                    "tier": one.tier,
                    "copied": one.copied.chunks if one.copied else 0,
                    "bytes": one.copied.bytes if one.copied else 0,
                    "note": one.note,
                }
                for one in warmed
            ]
        )
    else:
        for one in warmed:
            if one.copied is None:
                say(f"{one.tier}: nothing copied: {one.note}")
                continue
            besides = counted(
                declined=one.copied.declined, vanished=one.copied.vanished, corrupt=len(one.copied.corrupt)
            )
            say(
                f"{one.tier}: {one.copied.chunks:,} chunks copied, {format_bytes(one.copied.bytes)}; besides: {besides}"
            )
        if not warmed:
            say("No tier takes promotions.")
    if any(one.failed for one in warmed):
        raise typer.Exit(EXIT_FAILED)
