"""Lists what a store holds; a part that cannot be listed does not hide the rest."""

from __future__ import annotations

from typing import NamedTuple

from cakekv.errors import NoAnswer, StoreError, Unreadable
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.walking import separate_tiers, walk
from cakekv.store.member import Member

_IN_A_ROW = 32


class Listing(NamedTuple):
    """What was found."""

    chunks: list[StoredChunk]
    """Also what bears the name of a chunk and is none; it says so in its `fault`. What is in several tiers comes once.
    """
    troubles: list[str]
    """Why something was left out; a sentence each."""


def listing(store: Store) -> Listing:
    """List a store, of a tiered one all tiers.

    Raises
    ------
    StoreError
        Nothing could be listed.
    """
    found: dict[bytes, StoredChunk] = {}
    troubles: list[str] = []
    tiers = separate_tiers(store)
    failed: list[StoreError] = []
    for tier in tiers:
        try:
            for chunk in tier:
                if chunk.key not in found or found[chunk.key].fault:
                    found[chunk.key] = chunk
        except StoreError as error:
            failed.append(error)
            troubles.append(f"the {tier.name} tier: {error}" if len(tiers) > 1 else str(error))
    if not found and len(failed) == len(tiers):
        raise failed[-1]
    if len(tiers) == 1:  # a tiered store inside of another one passes its tiers over
        troubles += [f"the {member.name} tier is down" for member in down(store)]
    return Listing(list(found.values()), troubles)


def down(store: Store) -> list[Member]:
    """The tiers of a store that are not in use just now."""
    return [part for part in walk(store) if isinstance(part, Member) and not part.is_up]


class Patience:
    """Tells items that fail one by one from a store that fails as a whole."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self.first: StoreError | None = None
        """What went wrong first."""

    def failed(self, error: StoreError) -> None:
        """One item failed; raises the error if the next will fare no better."""
        if isinstance(error, Unreadable):  # of however many
            return
        self._in_a_row += 1
        self.first = self.first or error
        if isinstance(error, NoAnswer) or self._in_a_row >= _IN_A_ROW:
            raise error

    def went_well(self) -> None:
        """One item did not fail."""
        self._in_a_row = 0
