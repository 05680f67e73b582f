"""The measure of leaks itself: it finds deliberate ones, and is not misled by work that only comes and goes."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.faults.leaks import ALLOWED_BYTES, ALLOWED_COUNT, Sample, growth, leaks, sample

ROUNDS = 40


def work(leak: Callable[[], None]) -> list[Sample]:
    """Sample rounds of work that takes up to 16 MB for a while, and leaks."""
    choose, samples = random.Random(1), []
    gc.freeze()  # what other tests have left need not be looked through for every sample
    for number in range(ROUNDS):
        blocks = [bytearray(os.urandom(1 << 10) * 64) for _ in range(choose.randrange(256))]
        leak()
        if choose.random() < 0.15:
            samples.append(sample(number))  # in the middle of it: a spike
        del blocks
        samples.append(sample(number + 0.5))
    gc.unfreeze()
    return samples


@contextmanager
def leaking(kind: str) -> Iterator[Callable[[], None]]:
    kept: list[bytes] = []
    files: list[int] = []
    well = threading.Event()

    def thread() -> None:
        threading.Thread(target=well.wait, daemon=True).start()

    yield {
        "nothing": lambda: None,
        "memory": lambda: kept.append(os.urandom(2 * ALLOWED_BYTES // ROUNDS)),
        "files": lambda: files.append(os.dup(0)),
        "threads": thread,
    }[kind]
    well.set()
    for file in files:
        os.close(file)


@pytest.mark.parametrize("kind", ["nothing", "memory", "files", "threads"])
def test_deliberate_leaks_are_found(kind: str) -> None:
    with leaking(kind) as leak:
        found = leaks(work(leak))
    if kind == "nothing":
        assert not found
    else:
        assert [sentence.partition(" ")[0] for sentence in found] == [kind]


def test_the_trend_is_not_misled_by_outliers() -> None:
    choose = random.Random(2)
    level = [Sample(n, 10**8 + choose.randrange(10**5) + (n % 5 == 0) * 10**8, 20, 5 + n % 3) for n in range(50)]
    assert not leaks(level)
    rising = [one._replace(memory=one.memory + n * 2 * ALLOWED_BYTES // 50) for n, one in enumerate(level)]
    assert growth(rising)["memory"] == pytest.approx(2 * ALLOWED_BYTES, rel=0.1)
    assert len(leaks(rising)) == 1
    assert len(leaks([one._replace(files=n // 5) for n, one in enumerate(level)])) == 1
    assert not leaks([one._replace(files=n * ALLOWED_COUNT // 60) for n, one in enumerate(level)])
