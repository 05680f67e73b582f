"""Writers and readers of one folder, each in a process of its own."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

from cakekv.errors import MissingChunk, StoreError
from cakekv.store.disk import DiskStore
from tests.store.chunks import SIZE, chunk_of, key_of, read

CAPACITY = 8 * SIZE + SIZE // 2
NUMBERS = 24


def write(folder: str, seconds: float, seed: int) -> None:
    """Write chunks at random, delete some, and begin anew with a store now and then."""
    choose, figures = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with DiskStore(folder, CAPACITY) as store:
            for _ in range(200):
                number = choose.randrange(NUMBERS)
                if choose.random() < 0.05:
                    figures["deleted"] += store.delete([key_of(number)])
                else:
                    figures["written" if store.write(key_of(number), chunk_of(number)) else "declined"] += 1
            figures["evicted"] += store.evicted.chunks
    print(json.dumps(figures))


def check(folder: str, seconds: float, seed: int) -> None:
    """Read chunks at random; compare every byte."""
    choose, figures = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with DiskStore(folder, direct=choose.random() < 0.5) as store:
            for _ in range(500):
                number = choose.randrange(NUMBERS)
                try:
                    figures["right" if read(store, key_of(number)) == chunk_of(number) else "wrong"] += 1
                except MissingChunk:
                    figures["missing"] += 1
                except StoreError:
                    figures["failed"] += 1
    print(json.dumps(figures))
