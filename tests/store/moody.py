"""A store with moods, and what every store is asked."""

from __future__ import annotations

import threading
import time

from cakekv.errors import StoreError
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

    def __init__(self, inner=None, name="moody"):
        super().__init__(inner or MemoryStore())
        self.name = name
        self.well = threading.Event()
        self.well.set()
        self.hangs = False
        self.asked = []

    def _mood(self, what):
        self.asked.append(what)
        if not self.well.is_set():
            if self.hangs:
                self.well.wait(60)
            raise StoreError("not in the mood")

    def lookup(self, keys):
        self._mood("lookup")
        return super().lookup(keys)

    def open(self, key):
        self._mood("open")
        return super().open(key)

    def write(self, key, data):
        self._mood("write")
        return super().write(key, data)


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# One tier
