"""The disk tier under several processes, and under processes that are killed at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.chunk import verify_chunk
from cakekv.errors import MissingChunk
from cakekv.store.base import Store
from cakekv.store.disk import DiskStore

from .chunks import SIZE, chunk_of, key_of, read

CAPACITY = 5 * SIZE
NUMBERS = range(20)


def work(folder: Path, seed: int, rounds: int) -> None:
    """Write, read and delete chunks at random; what is read must be right."""
    choose = random.Random(seed)
    store = DiskStore(folder, CAPACITY)
    data = {number: chunk_of(number) for number in NUMBERS}
    print("ready", flush=True)
    for _ in range(rounds):
        number = choose.choice(NUMBERS)
        action = choose.random()
        if action < 0.7:
            store.write(key_of(number), data[number])
        elif action < 0.75:
            store.delete([key_of(number)])
        else:
            with contextlib.suppress(MissingChunk):
                assert read(store, key_of(number)) == data[number]


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts processes that `work`, and ends those that are left."""
    processes = []

    def started(folder: Path, seed: int, rounds: int) -> Any:
        program = f"from tests.store.test_disk_processes import work; work({str(folder)!r}, {seed}, {rounds})"
        path = [str(Path(__file__).parents[2]), *sys.path]
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def check(store: Store) -> None:
    """All that is visible is whole, and the counts say what is there."""
    stored = list(store)
    contents = {key_of(number): chunk_of(number) for number in NUMBERS}
    for chunk in stored:
        data = read(store, chunk.key)
        assert data == contents[chunk.key]
        verify_chunk(memoryview(data))
    stats = store.stats()
    assert (stats.chunks, stats.bytes) == (len(stored), sum(chunk.size for chunk in stored))
    assert stats.bytes <= CAPACITY


def bytes_in(folder: Path) -> int:
    """All bytes of chunks, whole or being written, while no name can change."""
    with (folder / "cakekv.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(file.stat().st_size for name in ("chunks", "incoming") for file in (folder / name).rglob("*.*"))


def test_processes_share_a_store_and_its_capacity(tmp_path: Path, start: Callable[..., Any]) -> None:
    folder = tmp_path / "store"
    store = DiskStore(folder, CAPACITY)
    processes = [start(folder, seed, 150) for seed in range(3)]
    while any(process.poll() is None for process in processes):
        assert bytes_in(folder) <= CAPACITY
        time.sleep(0.001)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    check(store)
    assert store.stats().chunks > 0
    assert list((folder / "incoming").iterdir()) == []


def test_processes_killed_at_any_moment_leave_a_sound_store(tmp_path: Path, start: Callable[..., Any]) -> None:
    folder = tmp_path / "store"
    store = DiskStore(folder, CAPACITY)
    delay = random.Random()
    for round_ in range(5):
        processes = [start(folder, f"{round_}-{seed}", 10**9) for seed in range(3)]
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()
        for process in processes:
            time.sleep(delay.random() * 0.03)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.returncode == -signal.SIGKILL
            assert bytes_in(folder) <= CAPACITY
        check(store)
        check(DiskStore(folder, CAPACITY))
        assert list((folder / "incoming").iterdir()) == []


SYSTEM_CALLS = [
    *((os, name) for name in ("open", "write", "pwrite", "fsync", "utime", "mkdir", "replace", "unlink", "close")),
    (fcntl, "flock"),
]


def killed_at(call: Any, action: Any) -> bool:
    """Do `action` in a child that is killed just before its system call number `call`. False if it got through."""
    child = os.fork()
    if not child:
        remaining = call

        def dying(real: Any) -> Any:
            def function(*args: Any, **kwargs: Any) -> Any:
                nonlocal remaining
                if not remaining:
                    os.kill(os.getpid(), signal.SIGKILL)
                remaining -= 1
                return real(*args, **kwargs)

            return function

        real_write = os.write
        os.write = lambda descriptor, data: real_write(descriptor, memoryview(data)[: SIZE // 2])
        for module, name in SYSTEM_CALLS:
            setattr(module, name, dying(getattr(module, name)))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def actions(folder: Path) -> dict[Any, Any]:
    capacity = 3 * SIZE

    def write(number: int) -> None:
        DiskStore(folder, capacity).write(key_of(number), chunk_of(number))

    return {
        "open": lambda: DiskStore(folder, capacity),
        "write with eviction": lambda: write(4),
        "replace": lambda: write(2),
        "delete": lambda: DiskStore(folder).delete([key_of(2), key_of(0)]),
        "shrink": lambda: DiskStore(folder, SIZE),
    }


@pytest.mark.parametrize("name", ["open", "write with eviction", "replace", "delete", "shrink"])
def test_a_kill_before_any_system_call_leaves_a_sound_store(tmp_path: Path, name: str) -> None:
    for call in range(500):
        folder = tmp_path / str(call)
        if name != "open":
            store = DiskStore(folder, 3 * SIZE)
            for number in range(3):
                store.write(key_of(number), chunk_of(number))
        killed = killed_at(call, actions(folder)[name])
        if name != "open":  # to those who had it open the store stays sound, too
            store.write(key_of(5), chunk_of(5))
            assert bytes_in(folder) <= 3 * SIZE
            check(store)
        store = DiskStore(folder, 3 * SIZE)
        check(store)
        assert bytes_in(folder) == store.stats().bytes
        assert store.write(key_of(6), chunk_of(6))
        assert store.lookup([key_of(6)]) == [SIZE]
        if not killed:
            break
    assert not killed
    assert call > 10
