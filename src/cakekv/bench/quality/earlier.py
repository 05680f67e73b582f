"""What a file of results has already, so that more recipes can be judged on the same documents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cakekv.bench.quality.judge import Judgement
from cakekv.codec.base import Codec
from cakekv.errors import BadInput

_SAME = ("model", "dtype", "context_tokens", "continuation_tokens", "chunk_tokens")


def earlier(
    file: Path, settings: Mapping[str, Any], documents: int, again: Collection[str], codec_of: Callable[[str], Codec]
) -> tuple[str, dict[tuple[str, float], list[Judgement]]]:
    """How a file of results with more in it will have been made, and its judgements by recipe and share computed.

    Recipes of which some documents are missing, or whose codec has changed since, are left out.

    Parameters
    ----------
    file : Path
        As `cakekv quality --json` writes it.
    settings : mapping
        What is measured now.
    documents : int
        How many there should be.
    again : collection of str
        Recipes that can be judged again.
    codec_of : callable
        Takes a recipe and gives its codec, with what it has learned of the model.

    Raises
    ------
    BadInput
        It is no such file, it was measured with other settings, or a recipe would be lost.
    """
    try:
        data = json.loads(file.read_text())
        command, figures = went_on(data, settings), data.get("recipes") or [data]
        judged = {
            (str(one["recipe"]), float(one["computed"])): [_judgement(document) for document in one["documents"]]
            for one in figures
        }
        fingerprints = {str(one["recipe"]): one["fingerprint"] for one in figures}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"cannot add to {file}: it is no file that `cakekv quality --json` wrote ({error!r})") from error
    check_settings(file, data, settings, _SAME)
    stale = {recipe for recipe, before in fingerprints.items() if codec_of(recipe).fingerprint != before}
    stale |= {recipe for (recipe, _), ones in judged.items() if len(ones) != documents}
    if lost := sorted(stale - set(again)):
        raise BadInput(
            f"cannot add to {file}: {lost[0]} was judged with another version of the codec, or not on "
            f"{documents} documents; judge it again with --recipe {lost[0]}"
        )
    return command, {variant: ones for variant, ones in judged.items() if variant[0] not in stale}


def check_settings(file: Path, before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `BadInput` if a file was measured with other settings of these names."""
    for name in names:
        if before.get(name) != now[name]:
            raise BadInput(
                f"cannot add to {file}: it was measured with {name} {before.get(name)}, and this is {now[name]}"
            )


def went_on(before: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """How a file of results will have been made once a run has added to it."""
    elsewhere = "" if before["machine"].get("processor") == run["machine"]["processor"] else " on another machine,"
    return f"{before['command']}; then{elsewhere} {run['command']}"


def check_same(file: Path, before: Judgement, now: Judgement) -> None:
    """Raise `BadInput` if two judgements cannot be of the same document: what the exact cache answers differs."""
    if (before.kind, before.asked) != (now.kind, now.asked):
        raise BadInput(f"cannot add to {file}: its documents are not those that are judged now")


def _judgement(document: Mapping[str, Any]) -> Judgement:
    values: dict[str, Any] = {field.name: document[field.name] for field in fields(Judgement)}
    values |= {name: math.nan for name, value in values.items() if value is None}
    return Judgement(**values)
