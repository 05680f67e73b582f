"""Why a prompt was not found in a store."""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.errors import StoreError
from cakekv.keys import Identity
from cakekv.store.base import Store


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
        differing = min(
            (sorted(name for name in mine if mine[name] != other.get(name)) for other in others.values()), key=len
        )
        sentences.append(
            f"The {tier.name} tier holds chunks of {len(others)} other model(s) or settings and none of this one; "
            f"the nearest differs in: {', '.join(differing)}."
        )
    return sentences
