"""The keys of shards: each worker of a tensor-parallel engine keeps its part of every chunk under keys of its own."""

from __future__ import annotations

from blake3 import blake3

from cakekv.keys import ChunkKey


def shard_key(key: ChunkKey, tag: str) -> ChunkKey:
    """The key of one shard of a chunk; `tag` says which."""
    return ChunkKey(blake3(key + tag.encode(), derive_key_context="cakekv shard").digest())
