"""Sizes that a look-up found, so that opening a chunk right after it need not ask the server again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cakekv.keys import ChunkKey

_MOST = 1 << 16


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
