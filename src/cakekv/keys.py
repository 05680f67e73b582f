"""Who a chunk is: model fingerprint, layout, recipe, tenant and the tokens so far make its key."""

from __future__ import annotations


class ChunkKey(bytes):
    """The 32-byte name of a chunk. Two chunks share it only if any engine may use one for the other."""

    __slots__ = ()
    LENGTH = 32


class Identity:  # placeholder until the keys land
    pass
