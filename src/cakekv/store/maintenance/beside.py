"""How much of what a store holds is no chunk, but what sights have worked out of several and stored beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cakekv.chunk import Form
from cakekv.errors import CorruptChunk, StoreError
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.reading import header_of

_SIZES, _OF_EACH = 32, 8
"""Of so many sizes, those that come most often, about so many headers are read; all, where these are of both kinds."""


class Beside(NamedTuple):
    """What was found beside chunks."""

    chunks: int
    bytes: int


def beside(store: Store, chunks: Iterable[StoredChunk], identities: Mapping[str, Mapping[str, str]]) -> Beside:
    """See by sizes, and into some of each size, which of a store's chunks are about more tokens than any chunk has.

    Parameters
    ----------
    store : Store
        Any.
    chunks : iterable of StoredChunk
        As it is listed.
    identities : mapping
        As from `Store.identities`: they say how long chunks are. Nothing can be told without.
    """
    longest = max((int(one["chunk_tokens"]) for one in identities.values() if "chunk_tokens" in one), default=0)
    by_size: dict[int, list[StoredChunk]] = {}
    for chunk in chunks if longest else ():
        if not chunk.fault:
            by_size.setdefault(chunk.size, []).append(chunk)
    chunks_beside = total = 0
    for size, ones in sorted(by_size.items(), key=lambda item: -len(item[1]))[:_SIZES]:
        looked_at = [_is_beside(store, one, longest) for one in ones[:: max(1, len(ones) // _OF_EACH)]]
        if any(looked_at):
            own = len(ones) if all(looked_at) else sum(_is_beside(store, one, longest) for one in ones)
            chunks_beside, total = chunks_beside + own, total + own * size
    return Beside(chunks_beside, total)


def _is_beside(store: Store, chunk: StoredChunk, longest: int) -> bool:
    try:
        with store.open(chunk.key) as reader:
            header = header_of(reader)
    except (CorruptChunk, StoreError):  # whoever asks for that finds out by verifying
        return False
    return header.shape.form is Form.CODED and header.tokens > longest
