"""A store with moods, and what every store is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store
from cakekv.store.memory import MemoryStore
from cakekv.store.wrapper import WrappedStore

from .chunks import chunk_of, key_of

OPERATIONS = {
    "lookup": lambda store: store.lookup([key_of(0)]),
    "open": lambda store: store.open(key_of(0)),
    "write": lambda store: store.write(key_of(0), chunk_of(0)),
    "delete": lambda store: store.delete([key_of(0)]),
    "list": list,
    "stats": lambda store: store.stats(),
    "identities": lambda store: store.identities(),
    "remember": lambda store: store.remember_identity(key_of(0).hex(), {}),
}


class Moody(WrappedStore):
    """A store that fails, or hangs, when it is told to, and logs what it was asked."""

    def __init__(self, inner: Store | None = None, name: str = "moody") -> None:
        super().__init__(inner or MemoryStore())
        self.name = name
        self.well = threading.Event()
        self.well.set()
        self.hangs = False
        self.asked: list[Any] = []

    def _mood(self, what: Any) -> None:
        self.asked.append(what)
        if not self.well.is_set():
            if self.hangs:
                self.well.wait(60)
            raise StoreError("not in the mood")

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        self._mood("lookup")
        return super().lookup(keys)

    def open(self, key: ChunkKey) -> ChunkReader:
        self._mood("open")
        return super().open(key)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self._mood("write")
        return super().write(key, data)


def eventually(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# One tier
