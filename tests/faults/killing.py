"""Writers that are killed at random moments. Run in a process of its own, because it forks."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cakekv.chunk import verify_chunk
from cakekv.store.disk import DiskStore
from tests.store.chunks import chunk_of, key_of, read

_NUMBER = struct.Struct("<I")
READY = 2**32 - 1


def killed(work: Callable[[Callable[[int], None]], None], after_s: float) -> list[int]:
    """Fork a process that does `work`, and kill it so long after it has told that it is ready.

    `work` is called with a function to tell of a number; returned are those that it told.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            work(lambda number: (os.write(writing, _NUMBER.pack(number)), None)[1])
        finally:
            os._exit(1)  # it should not come to that: it works until it is killed
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read(_NUMBER.size) == _NUMBER.pack(READY)
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL, "it ended by itself"
        told = pipe.read()
    return [number for (number,) in _NUMBER.iter_unpack(told)]


def disk(folder: str, rounds: int, seed: int) -> None:
    """Kill processes that write chunks, each `seed`ed moment another one, and look at what is left."""
    choose, figures = random.Random(seed), {"kills": 0, "in mid-write": 0, "chunks checked": 0}
    intact: set[int] = set()
    for turn in range(rounds):
        first = 1000 * turn

        def write(tell: Callable[[int], None], first: int = first) -> None:
            store = DiskStore(folder)
            data = [chunk_of(first + number) for number in range(200)]
            tell(READY)
            for number in range(200):
                assert store.write(key_of(first + number), data[number])
                tell(first + number)
            signal.pause()

        acknowledged = set(killed(write, choose.random() * 0.03))
        figures["kills"] += 1
        figures["in mid-write"] += any(Path(folder, "incoming").iterdir())
        store = DiskStore(folder)
        names = {key_of(number): number for number in [*intact, *range(first, first + 200)]}
        stored = {names[chunk.key] for chunk in store}
        assert acknowledged <= stored, "what was reported as written is there"
        assert intact <= stored, "what was there before is there"
        assert len(stored - intact - acknowledged) <= 1, "and at most one whose writing was not reported any more"
        for number in stored:
            data = read(store, key_of(number))
            assert data == chunk_of(number), "every visible byte is right"
            verify_chunk(memoryview(data))
        figures["chunks checked"] += len(stored)
        stats = store.stats()
        assert (stats.chunks, stats.bytes) == (len(stored), sum(chunk.size for chunk in store))
        assert not any(Path(folder, "incoming").iterdir()), "leftovers are removed"
        intact = stored
        if len(intact) > 40:
            gone = set(choose.sample(sorted(intact), len(intact) - 10))
            assert store.delete([key_of(number) for number in gone]) == len(gone)
            intact -= gone
    print(json.dumps(figures))


def cake(folder: str, rounds: int, seed: int) -> None:
    """Kill processes in mid-prefill, or mid-answer, while they save; and restore from what they left."""
    import torch

    torch.set_num_threads(1)  # so that there are no other threads to lose in a fork
    from cakekv.cake import Cake
    from tests.cake.conftest import CHUNK, engine

    model, choose = engine.__wrapped__(), random.Random(seed)  # type: ignore[attr-defined]
    figures = {"kills": 0, "loaded tokens": 0, "wrong outputs": 0}

    def answer(store: Any, prompt: list[int]) -> Any:
        with Cake(model, store=store, chunk_tokens=CHUNK, max_span_tokens=CHUNK) as one:
            return one.generate(prompt, max_new_tokens=4, mode="load")

    for _ in range(rounds):
        prompt = [choose.randrange(211) for _ in range(12 * CHUNK + 3)]
        expected = answer(None, prompt).token_ids

        def answered(tell: Callable[[int], None], prompt: list[int] = prompt) -> None:
            with Cake(model, store=DiskStore(folder), chunk_tokens=CHUNK, max_span_tokens=CHUNK) as one:
                tell(READY)
                one.generate(prompt, max_new_tokens=2 * CHUNK)
                one.wait_saved()
                signal.pause()

        killed(answered, choose.random() * 0.12)
        figures["kills"] += 1
        store = DiskStore(folder)
        stored = store.stats().chunks
        restored = answer(store, prompt)
        figures["wrong outputs"] += restored.token_ids != expected
        assert restored.report.loaded_tokens == min(stored, 12) * CHUNK, "what was saved of the prompt is used"
        assert restored.report.recomputed_tokens == 0, "and nothing of it was damaged"
        assert store.stats().chunks == max(stored, 12) + 1, "the rest is saved now, and the tail of this answer"
        figures["loaded tokens"] += restored.report.loaded_tokens
        assert answer(DiskStore(folder), prompt).report.loaded_tokens == 12 * CHUNK
        store.delete([chunk.key for chunk in store])
    print(json.dumps(figures))
