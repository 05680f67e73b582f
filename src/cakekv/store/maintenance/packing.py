"""How much packing saves of what a store holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cakekv.chunk import is_packed
from cakekv.errors import CorruptChunk, StoreError
from cakekv.store.base import Store, StoredChunk
from cakekv.store.maintenance.reading import header_of

_LOOKED_AT = 32
"""Of so many packed chunks, headers are read; of the others, it is taken for the same."""


class Packing(NamedTuple):
    """The packed chunks of a store."""

    chunks: int
    bytes: int
    """That they have."""
    unpacked_bytes: int
    """That they would have unpacked; from some of them."""


def packing(store: Store, chunks: Iterable[StoredChunk]) -> Packing:
    """See which of these chunks of a store are packed, by their sizes, and into some of them."""
    packed = [chunk for chunk in chunks if not chunk.fault and is_packed(chunk.size)]
    total = sum(chunk.size for chunk in packed)
    here = there = 0
    for chunk in packed[:: max(1, len(packed) // _LOOKED_AT)]:
        try:
            with store.open(chunk.key) as reader:
                there += header_of(reader).shape.exact.total_bytes
                here += chunk.size
        except (CorruptChunk, StoreError):  # whoever asks for that finds out by verifying
            continue
    return Packing(len(packed), total, round(total * there / here) if here else total)
