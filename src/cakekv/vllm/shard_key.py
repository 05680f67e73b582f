"""Each worker of a tensor-parallel engine keeps a share of every chunk, under a key of its own."""

from __future__ import annotations

from blake3 import blake3

from cakekv.keys import ChunkKey


def shard_key(key: ChunkKey, tag: str) -> ChunkKey:
    """The key of one worker's share of a chunk; `tag` says which share it holds."""
    return ChunkKey(blake3(key + tag.encode(), derive_key_context="cakekv shard").digest())
