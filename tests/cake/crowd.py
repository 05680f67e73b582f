"""Several requests at once: an engine and a store that are watched, requests in threads of their own."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader
from cakekv.store.memory import MemoryStore
from tests.cake.poisoned import Poisoned

CHUNK = 16
REQUEST = ContextVar("REQUEST", default="")
"""Name of the request that is served."""
WAIT_S = 60.0
"""A safety net: what is waited for happens in milliseconds."""


class Watched(Poisoned):
    """Knows who computes: `spans` are (request, first position, tokens). Calls `before` with each."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.spans: list[tuple[str, int, int]] = []
        self.before: Callable[[str, int, int], None] = lambda name, start, tokens: None
        self.computing = 0
        self.buffers = 0

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        name = REQUEST.get()
        self.spans.append((name, start, len(token_ids)))
        self.before(*self.spans[-1])
        return super().compute(cache, token_ids, start, gate)

    def staging(self, size: int) -> memoryview:
        self.buffers += 1
        return super().staging(size)

    def turns(self) -> list[str]:
        """Who computed, without repetitions."""
        return [name for name, _ in groupby(name for name, _, _ in self.spans)]


class Watching(MemoryStore):
    """Calls `before_open` with each key; counts who reads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.before_open: Callable[[ChunkKey], object] = lambda key: None
        self.opened: list[ChunkKey] = []
        self.at_once = self.most_at_once = 0
        self._counting = threading.Lock()

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._counting:
            self.opened.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.before_open(key)
            return super().open(key)
        finally:
            with self._counting:
                self.at_once -= 1


def start(name: str, call: Callable[[], Any]) -> Future[Any]:
    """Run a request of this name in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        REQUEST.set(name)
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get somewhere."""
    for _ in range(int(WAIT_S * 1000)):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never happened")


def tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(211) for _ in range(count)]


def slow(cake: Cake) -> None:
    """Let the cake believe that its tier takes a minute per chunk."""
    cake.load_costs[0].observe(16_000, 0.0, 60.0)


def asking(cake: Cake) -> int:
    return len(cake._arms.arbiter._asking)


@contextmanager
def nothing_left(cake: Cake, engine: Watched) -> Iterator[None]:
    """Afterwards nobody holds anything."""
    yield
    arbiter, loader = cake._arms.arbiter, cake._arms.loader
    until(lambda: not loader._workers[0] and not any(loader._in_flight))
    assert not arbiter._asking
    assert not arbiter._open
    assert not loader._open
    assert arbiter._turns.holder is None
    assert cake._saver is not None
    assert len(cake._saver._staging._free) == engine.buffers, "all buffers are back"
    assert engine.buffers <= cake.tiers[0].parallel_reads + 1, "one per worker, and the saver's"


def filled(engine: TransformersEngine, *prompts: Sequence[int]) -> Watching:
    store = Watching()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        for prompt in prompts:
            cake.prefill(prompt)
    return store
