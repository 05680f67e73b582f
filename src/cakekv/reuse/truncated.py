"""Which stored chunks serve a prompt that was truncated, and where: those of what it was before each cut, moved.

Context overflow as in CachedAttention (arXiv 2403.19708): the oldest part of a conversation is dropped, and what is
stored of the rest is turned to its new positions. It has seen what was dropped, so it is not exact; nor is what is
computed behind it. That is stored under keys which follow from the cut (`cakekv.keys.truncated_root`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cakekv.keys import ChunkKey, Identity, chained_keys, truncated_root
from cakekv.prompt import Tokenized
from cakekv.reuse.serving import Serving

Positions = npt.NDArray[np.int64]


class Chain(NamedTuple):
    """Keys under which chunks are saved that follow one another."""

    root: bytes
    keys: list[ChunkKey]
    tail: Serving | None = None
    """What is stored behind the last full chunk of an earlier answer, if it serves the prompt."""

    def parent(self, chunk: int) -> bytes:
        """What a chunk's key follows: the key of the one before, or the root."""
        return self.keys[chunk - 1] if chunk else self.root


class Level(NamedTuple):
    """What a prompt was before one of its cuts, or what the last one left."""

    chain: Chain
    token_ids: list[int]
    origin: Positions
    """Where every token that the last cut left stands here."""

    def place(self, chunks: Iterable[Serving]) -> Iterator[tuple[int, Serving]]:
        """Where chunks of this level stand in what is left, as far as their tokens are left.

        A chunk of which the end was dropped is left out, since chunks are cut only at their beginning.
        """
        for chunk in chunks:
            end = chunk.position + chunk.tokens
            low, high = (int(at) for at in np.searchsorted(self.origin, [chunk.position, end]))
            if high > low and self.origin[low] + high - low == end:
                yield low, chunk._replace(skip=int(self.origin[low]) - chunk.position, exact=False)


def levels_of(identity: Identity, prompt: Tokenized, context: int) -> list[Level]:
    """What a prompt was before each of its cuts, the first cut first, and what is left by the last.

    No more of each than `context` tokens, because nothing behind that was ever computed.
    """
    root, tokens = identity.root, identity.chunk_tokens
    roots = [root]
    for cut in prompt.cuts:
        roots.append(truncated_root(roots[-1], tokens, cut.token_ids, cut.dropped, cut.turn))
    contents = [content[:context] for content in (*(cut.token_ids for cut in prompt.cuts), prompt.token_ids)]
    return [
        Level(Chain(root, chained_keys(root, tokens, content)), content, origin)
        for root, content, origin in zip(roots, contents, _origins(prompt), strict=True)
    ]


def serve_truncated(chunks: Iterable[tuple[int, Serving]], tokens: int) -> list[tuple[int, Serving]]:
    """Of chunks that overlap, those that serve a prompt of so many tokens, ascending. The first given is preferred."""
    covered = np.zeros(tokens, bool)
    chosen = []
    for start, serving in chunks:
        stretch = covered[start : start + serving.served]
        if not stretch.all():
            stretch[:] = True
            chosen.append((start, serving))
    return sorted(chosen, key=lambda one: one[0])


def dropped_runs(prompt: Tokenized) -> list[range]:
    """The positions of what a prompt was first that all its cuts left out."""
    origin = _origins(prompt)[0]
    edges = [-1, *origin.tolist(), len(prompt.cuts[0].token_ids)]
    return [range(one + 1, other) for one, other in pairwise(edges) if other > one + 1]


def _origins(prompt: Tokenized) -> list[Positions]:
    """Of every token that is left, where it stood before each cut, and where it stands."""
    origins = [np.arange(len(prompt.token_ids))]
    for cut in reversed(prompt.cuts):
        after = origins[0]
        origins.insert(0, np.where(after < cut.dropped.start, after, after + len(cut.dropped)))
    return origins
