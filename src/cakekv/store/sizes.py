"""Remembers the sizes that a look-up found, and how far to trust them, so that opening a chunk asks no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cakekv.errors import StoreError
from cakekv.keys import ChunkKey

_MOST = 1 << 16


class Sizes(list[int | None]):
    """The answer to a look-up of which not everything could be told.

    Parameters
    ----------
    sizes : iterable of int or None
        As `Store.lookup` answers; None also where nothing is known.
    doubt : str or None
        What could not be told, and why; None if all could.
    """

    def __init__(self, sizes: Iterable[int | None], doubt: str | None) -> None:
        super().__init__(sizes)
        self.doubt = doubt


def known_sizes(
    keys: Sequence[ChunkKey], known: Mapping[ChunkKey, int | None], failed: Mapping[ChunkKey, StoreError]
) -> list[int | None]:
    """The answer to a look-up from what is known of each chunk, and why nothing is of others."""
    unknown = [key for key in keys if key not in known]
    if not unknown:
        return [known[key] for key in keys]
    reason = next((str(failed[key]) for key in unknown if key in failed), "it did not answer in time")
    doubt = f"{len(unknown):,} of {len(keys):,} chunks could not be looked up, and count as not stored: {reason}"
    return Sizes((known.get(key) for key in keys), doubt)


def doubt_of(answer: Sequence[int | None]) -> str | None:
    """What a look-up could not tell; None if it told all."""
    return answer.doubt if isinstance(answer, Sizes) else None


class FoundSizes:
    """What look-ups found, each size good for one opening.

    A chunk may be gone, or replaced, by the time it is opened on the strength of this; then its reader says so. All
    methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._sizes: dict[ChunkKey, int] = {}

    def note(self, keys: Sequence[ChunkKey], sizes: Sequence[int | None]) -> None:
        """Remember the answer to a look-up."""
        if len(self._sizes) + len(keys) > _MOST:
            self._sizes.clear()
        self._sizes.update((key, size) for key, size in zip(keys, sizes, strict=True) if size is not None)

    def take(self, key: ChunkKey) -> int | None:
        """The size found for a chunk, once; None if it is not known."""
        return self._sizes.pop(key, None)

    def forget(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks have changed."""
        for key in keys:
            self._sizes.pop(key, None)
