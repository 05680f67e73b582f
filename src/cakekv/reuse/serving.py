"""Which stored chunk can serve which range of a prompt: chunks of its own prefix, and chunks of its documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cakekv.keys import ChunkKey


class Serving(NamedTuple):
    """A stored chunk, as far as it serves a prompt."""

    key: ChunkKey
    position: int
    """Of the chunk's first token in what it was computed in."""
    tokens: int
    """Tokens of the chunk."""
    skip: int = 0
    """Tokens at its beginning that do not serve."""
    exact: bool = True
    """Whether it holds what a prefill of this very prompt would compute."""

    @property
    def served(self) -> int:
        """Tokens that serve."""
        return self.tokens - self.skip


class Grid(NamedTuple):
    """A prompt cut into chunks of the planner's."""

    starts: list[int]
    """Where each begins."""
    servings: list[Serving | None]
    """What can serve it."""


def serve_chain(keys: Sequence[ChunkKey], chunk_tokens: int, tokens: int, exact: bool = True) -> list[Serving]:
    """Chunks that follow one another from position 0 on, `tokens` in all; the last one may be shorter."""
    starts = range(0, chunk_tokens * len(keys), chunk_tokens)
    return [
        Serving(key, start, min(chunk_tokens, tokens - start), 0, exact)
        for key, start in zip(keys, starts, strict=True)
    ]


def serve_document(chain: Sequence[Serving], start: int, without: range) -> list[tuple[int, Serving]]:
    """What a document's chunks serve of a prompt, with the positions where that begins.

    Parameters
    ----------
    chain : sequence of Serving
        The document's chunks.
    start : int
        Where the document stands.
    without : range
        Positions at its beginning that are computed.
    """
    found = []
    for serving in chain:
        at = start + serving.position
        skip = max(0, without.stop - at) if without else 0
        if skip < serving.tokens:
            found.append((at + skip, serving._replace(skip=skip)))
    return found


def lay_out(
    prompt_tokens: int,
    chunk_tokens: int,
    prefix: Sequence[Serving],
    documents: Iterable[tuple[int, Serving]],
) -> Grid:
    """Cut a prompt into chunks: those of its prefix, then what documents serve, and between these what is computed.

    Parameters
    ----------
    prompt_tokens, chunk_tokens : int
        Lengths.
    prefix : sequence of Serving
        Chunks of the prompt's own prefix, from position 0 on, of the usual length; the last one may be shorter.
    documents : iterable of (position, Serving)
        What documents serve, ascending. What the prefix covers is left to it.
    """
    servings: list[Serving | None] = list(prefix)
    covered = sum(serving.tokens for serving in prefix)
    starts = list(range(0, covered, chunk_tokens))

    def compute_to(end: int) -> None:
        """Cut at the multiples of a chunk's length, where chunks of the prefix end that are to be saved."""
        cuts = [covered, *range(covered // chunk_tokens * chunk_tokens + chunk_tokens, end, chunk_tokens)]
        starts.extend(cuts if covered < end else [])
        servings.extend([None] * (len(starts) - len(servings)))

    for start, serving in documents:
        hidden = max(0, covered - start)
        if hidden >= serving.served:
            continue
        compute_to(start + hidden)
        starts.append(start + hidden)
        servings.append(serving._replace(skip=serving.skip + hidden))
        covered = start + serving.served
    compute_to(prompt_tokens)
    return Grid(starts, servings)
