"""Restore a prompt's KV cache from both ends: compute the head, load the tail, meet in the middle."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cakekv.exports import exporting

__version__ = "0.2.0"
__all__ = [
    "BadInput",
    "BadOption",
    "CacheRewritten",
    "Cake",
    "CakeClosed",
    "CakeError",
    "CannotEncode",
    "CannotPin",
    "CannotUnpack",
    "Chat",
    "ChunkFault",
    "ChunkKey",
    "ChunkReader",
    "Codec",
    "CorruptChunk",
    "DamagedCode",
    "Document",
    "Engine",
    "Eviction",
    "Generation",
    "MemoryStore",
    "Metrics",
    "MissingChunk",
    "NoAnswer",
    "NotDeleted",
    "OutOfReach",
    "PinRefused",
    "Pinned",
    "PlannedRun",
    "Policy",
    "Prefetch",
    "Prefill",
    "Progress",
    "PromptTooLong",
    "ReadOnly",
    "RequestState",
    "RestoreReport",
    "SaveReport",
    "Session",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreStats",
    "StoredChunk",
    "TierDown",
    "TransformersEngine",
    "Truncated",
    "UnknownKey",
    "UnknownRotation",
    "Unreadable",
    "UnsupportedEngine",
    "UnsupportedModel",
    "open_store",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet, until the application says otherwise

_HOMES = {
    "Cake": "cake",
    "Chat": "prompt",
    "ChunkKey": "keys",
    "ChunkReader": "store.base",
    "Codec": "codec.base",
    "DamagedCode": "codec.base",
    "Document": "prompt",
    "Engine": "engine.base",
    "Eviction": "store.eviction.base",
    "Generation": "cake",
    "MemoryStore": "store.memory",
    "Metrics": "metrics",
    "Pinned": "cake",
    "PlannedRun": "cake",
    "Prefetch": "cake",
    "Policy": "restore.priority",
    "Prefill": "cake",
    "Progress": "cake",
    "RequestState": "restore.priority",
    "RestoreReport": "restore.report",
    "SaveReport": "cake",
    "Session": "embedded.session",
    "Store": "store.base",
    "StoreStats": "store.base",
    "StoredChunk": "store.base",
    "TransformersEngine": "engine.transformers",
    "Truncated": "prompt",
    "open_store": "store.opening",
}
"""Where each public name is; all others of `__all__` are errors."""

_RENAMED: dict[str, str] = {}
"""Public names of earlier versions, and what they are called now."""

if TYPE_CHECKING:
    from cakekv.cake import Cake, Generation, Pinned, PlannedRun, Prefetch, Prefill, Progress, SaveReport
    from cakekv.codec.base import Codec, DamagedCode
    from cakekv.embedded.session import Session
    from cakekv.engine.base import Engine
    from cakekv.engine.transformers import TransformersEngine
    from cakekv.errors import (
        BadInput,
        BadOption,
        CacheRewritten,
        CakeClosed,
        CakeError,
        CannotEncode,
        CannotPin,
        CannotUnpack,
        ChunkFault,
        CorruptChunk,
        MissingChunk,
        NoAnswer,
        NotDeleted,
        OutOfReach,
        PinRefused,
        PromptTooLong,
        ReadOnly,
        StoreError,
        StoreFull,
        TierDown,
        UnknownKey,
        UnknownRotation,
        Unreadable,
        UnsupportedEngine,
        UnsupportedModel,
    )
    from cakekv.keys import ChunkKey
    from cakekv.metrics import Metrics
    from cakekv.prompt import Chat, Document, Truncated
    from cakekv.restore.priority import Policy, RequestState
    from cakekv.restore.report import RestoreReport
    from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats
    from cakekv.store.eviction.base import Eviction
    from cakekv.store.memory import MemoryStore
    from cakekv.store.opening import open_store
else:  # what is asked for is imported when it is asked for, so that `import cakekv` stays fast
    __getattr__ = exporting(__name__, {name: _HOMES.get(name, "errors") for name in __all__}, _RENAMED)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
