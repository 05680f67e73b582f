"""Why a prompt, or a part of it, was not found in a store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cakekv.errors import BadInput, StoreError
from cakekv.keys import ChunkKey, Identity, chained_keys
from cakekv.quantities import format_time, is_time
from cakekv.store.base import Removal, Store
from cakekv.store.maintenance.walking import walk
from cakekv.store.tail_only import TailOnlyStore

_MOST_OTHERS = 16


def why_nothing_is_stored(
    identity: Identity, tiers: Sequence[Store], found: Sequence[dict[str, dict[str, str]] | StoreError]
) -> list[str]:
    """One sentence per tier that holds chunks, none of which this model may use for any prompt.

    Parameters
    ----------
    identity : Identity
        Who asks.
    tiers : sequence of Store
        Where nothing was found.
    found : sequence
        The identities noted in each, or why it could not be asked.
    """
    sentences = []
    mine = identity.fields()
    for tier, others in zip(tiers, found, strict=True):
        if isinstance(others, StoreError):
            sentences.append(f"The {tier.name} tier could not be asked whose chunks it holds: {others}")
            continue
        if not others or identity.root.hex() in others:
            continue
        nearest = min((differing(mine, other) for other in others.values()), key=len)
        sentences.append(
            f"The {tier.name} tier holds chunks of {len(others)} other model(s) or settings and none of this one; "
            f"the nearest differs in: {', '.join(nearest)}."
        )
    return sentences


def differing(mine: Mapping[str, str], other: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
    """The fields in which an identity differs from another: name to both values; None where the other has none."""
    return {name: (mine[name], other.get(name)) for name in sorted(mine) if mine[name] != other.get(name)}


@dataclass(frozen=True)
class Whereabouts:
    """Where one chunk of a prompt is, or what became of it."""

    key: ChunkKey
    start: int
    """Position of its first token."""
    tokens: int
    tiers: list[str] = field(default_factory=list)
    """Names of the tiers that hold it."""
    reasons: list[str] = field(default_factory=list)
    """If none does: what is known of why, in words."""


class OtherIdentity(NamedTuple):
    """An identity that the store knows, beside the one that was asked for."""

    root: str
    differs: dict[str, tuple[str, str | None]]
    """As in `differing`."""
    chunks: int | None
    """How many chunks of this very prompt are stored under it; None if its keys cannot be made here."""


@dataclass(frozen=True)
class PromptExplanation:
    """What a store holds of a prompt, and why not more."""

    prompt_tokens: int
    chunk_tokens: int
    known: bool
    """Whether any tier has a note that chunks of this identity were saved there."""
    chunks: list[Whereabouts]
    others: list[OtherIdentity]
    """The nearest first. If the identity is known, only those under which chunks of this prompt are stored."""
    notes: list[str]


def prompt_keys(root: bytes, fields: Mapping[str, str], token_ids: Sequence[int]) -> list[ChunkKey]:
    """The keys of a prompt's full chunks.

    Parameters
    ----------
    root, fields, token_ids
        As in `explain_prompt`.

    Raises
    ------
    BadInput
        As there.
    """
    chunk_tokens = _chunk_tokens(fields)
    if chunk_tokens is None:
        raise BadInput("the chunks of this identity were saved by another engine; their keys cannot be made here")
    return chained_keys(root, chunk_tokens, token_ids)


def explain_prompt(
    root: bytes, fields: Mapping[str, str], token_ids: Sequence[int], tiers: Sequence[Store]
) -> PromptExplanation:
    """Look for a prompt chunk by chunk, under its identity and under all others that the tiers know.

    Parameters
    ----------
    root : bytes
        The identity's.
    fields : mapping of str to str
        The identity's; "chunk_tokens" must be among them.
    token_ids : sequence of int
        The prompt, or its beginning.
    tiers : sequence of Store
        Where to look; for instance `store.tiers`.

    Raises
    ------
    BadInput
        The tokens are not token ids, or the identity was saved by another engine, which makes its keys otherwise.
    """
    keys = prompt_keys(root, fields, token_ids)
    chunk_tokens = int(fields["chunk_tokens"])
    notes: list[str] = []
    known: dict[str, dict[str, str]] = {}
    holding: dict[ChunkKey, list[str]] = {key: [] for key in keys}
    working = []
    for tier in tiers:
        try:
            for key, size in zip(keys, tier.lookup(keys), strict=True):
                if size is not None:
                    holding[key].append(tier.name)
            known |= tier.identities()
        except StoreError as error:
            notes.append(f"The {tier.name} tier could not be asked: {error}")
        else:
            working.append(tier)
    reasons = _reasons([key for key in keys if not holding[key]], working, notes)
    chunks = []
    for index, key in enumerate(keys):
        start = index * chunk_tokens
        why = [] if holding[key] else [*reasons.get(key, ()), *_declined(start + chunk_tokens, working)]
        chunks.append(Whereabouts(key, start, chunk_tokens, holding[key], why))
    mine = dict(fields)
    others = [
        OtherIdentity(other, differing(mine, theirs), _stored_under(other, theirs, token_ids, working))
        for other, theirs in sorted(known.items(), key=lambda item: len(differing(mine, item[1])))[: _MOST_OTHERS + 1]
        if other != root.hex()
    ]
    is_known = root.hex() in known
    return PromptExplanation(
        len(token_ids), chunk_tokens, is_known, chunks, [one for one in others if one.chunks or not is_known], notes
    )


def _reasons(missing: Sequence[ChunkKey], tiers: Sequence[Store], notes: list[str]) -> dict[ChunkKey, list[str]]:
    """What each tier remembers of chunks that are nowhere."""
    reasons: dict[ChunkKey, list[str]] = {}
    for tier in tiers if missing else ():
        removals = tier.removals(missing)
        if removals is None:
            notes.append(
                f"What goes from the {tier.name} tier, and when, is decided by its server, which does not tell."
            )
            continue
        for key, removal in removals.items():
            reasons.setdefault(key, []).append(_sentence(tier.name, removal))
    return reasons


def _sentence(tier: str, removal: Removal) -> str:
    when = f" at {format_time(removal.at, '%Y-%m-%d %H:%M')}" if is_time(removal.at) else ", it is not known when"
    how = "evicted from" if removal.reason == "capacity" else "deleted on request from"
    return f"{how} {tier}{when}"


def _declined(end: int, tiers: Sequence[Store]) -> list[str]:
    heads = [part.skip_head for tier in tiers for part in walk(tier) if isinstance(part, TailOnlyStore)]
    return [f"never kept: skip_head={heads[0]}"] if heads and end <= min(heads) and len(heads) >= len(tiers) else []


def _stored_under(root: str, fields: Mapping[str, str], token_ids: Sequence[int], tiers: Sequence[Store]) -> int | None:
    chunk_tokens = _chunk_tokens(fields)
    if chunk_tokens is None:
        return None
    keys = chained_keys(bytes.fromhex(root), chunk_tokens, token_ids)
    found = 0
    for tier in tiers:
        try:
            found = max(found, sum(size is not None for size in tier.lookup(keys)))
        except StoreError:
            continue
    return found


def _chunk_tokens(fields: Mapping[str, str]) -> int | None:
    """Tokens per chunk; None if this identity's keys are not made of its root and the tokens alone."""
    text = fields.get("chunk_tokens", "")
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        return None
    try:
        layout = json.loads(fields.get("layout", ""))
    except (ValueError, RecursionError):
        layout = None
    return None if isinstance(layout, dict) and layout.get("engine") == "vllm" else int(text)
