"""Which stored chunks serve a prompt that was truncated, and where: those of what it was before each cut, moved.

Context overflow as in CachedAttention (arXiv 2403.19708): the oldest part of a conversation is dropped, and what is
stored of the rest is turned to its new positions. It has seen what was dropped, so it is not exact; nor is what is
computed behind it. That is stored under keys which follow from the cut (`cakekv.keys.truncated_root`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cakekv.keys import ChunkKey, Identity, chained_keys, truncated_root
from cakekv.prompt import Tokenized
from cakekv.reuse.serving import Serving, serve_chain

Positions = npt.NDArray[np.int64]


def truncated_keys(identity: Identity, prompt: Tokenized) -> list[list[ChunkKey]]:
    """The keys of what a prompt was before each of its cuts, the first cut first, and of what is left by the last."""
    root, tokens, keys = identity.root, identity.chunk_tokens, []
    for cut in prompt.cuts:
        keys.append(chained_keys(root, tokens, cut.token_ids))
        root = truncated_root(root, tokens, cut.token_ids, cut.dropped, cut.turn)
    return [*keys, chained_keys(root, tokens, prompt.token_ids)]


def stands_at(
    prompt: Tokenized, keys: Sequence[Sequence[ChunkKey]], chunk_tokens: int
) -> list[list[tuple[int, Serving]]]:
    """Where the chunks of `truncated_keys` stand in what is left of a prompt, as far as their tokens are left.

    A chunk of which the end was dropped is left out, since chunks are cut only at their beginning.
    """
    lengths = [len(cut.token_ids) for cut in prompt.cuts] + [len(prompt.token_ids)]
    return [
        list(_moved(serve_chain(chain, chunk_tokens, tokens, exact=False), origin))
        for chain, tokens, origin in zip(keys, lengths, _origins(prompt), strict=True)
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


def _moved(chain: Iterable[Serving], origin: Positions) -> Iterator[tuple[int, Serving]]:
    for serving in chain:
        end = serving.position + serving.tokens
        low, high = (int(at) for at in np.searchsorted(origin, [serving.position, end]))
        if high > low and origin[low] + high - low == end:
            yield low, serving._replace(skip=int(origin[low]) - serving.position)
