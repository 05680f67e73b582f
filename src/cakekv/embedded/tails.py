"""Tails: what stands behind the last full chunk of a prompt and its answer, stored as a chunk that is not full.

Whoever asks for a tail knows how its prompt goes on, but not where the tail ended. Lengths that this process has saved
are remembered; for others, every length is asked for where that costs one more round trip (`Store.probe`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from cakekv.keys import ChunkKey, tail_keys
from cakekv.reuse.serving import Serving

_REMEMBERED = 1 << 14
"""Places of tails."""
_LENGTHS = 8
"""Of tails at one place: of the newest answers to one prompt."""


class Tails:
    """The lengths of tails that were saved lately. May be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lengths: OrderedDict[bytes, list[int]] = OrderedDict()
        """By the key of the chunk before."""

    def note(self, parent: bytes, tokens: int) -> None:
        """A tail of so many tokens was saved behind the chunk `parent`."""
        with self._lock:
            known = self._lengths.pop(parent, [])
            self._lengths[parent] = [*(length for length in known if length != tokens), tokens][-_LENGTHS:]
            while len(self._lengths) > _REMEMBERED:
                self._lengths.popitem(last=False)

    def of(self, parents: Sequence[bytes], chunk_tokens: int, token_ids: Sequence[int]) -> list[Serving]:
        """The remembered tails that a prompt may go on from; `parents` are what its chunks follow, from the first."""
        with self._lock:
            known = [(chunk, self._lengths[parent]) for chunk, parent in enumerate(parents) if parent in self._lengths]
        return [
            serving
            for chunk, lengths in known
            for serving in tails_at(parents[chunk], chunk * chunk_tokens, chunk_tokens, token_ids)
            if serving.tokens in lengths
        ]


def tails_at(parent: bytes, start: int, chunk_tokens: int, token_ids: Sequence[int]) -> list[Serving]:
    """All tails that can serve a prompt behind the chunk `parent`, which ends at `start`; the shortest first."""
    keys: list[ChunkKey] = tail_keys(parent, token_ids[start : start + chunk_tokens - 1])
    return [Serving(key, start, tokens) for tokens, key in enumerate(keys, start=1)]
