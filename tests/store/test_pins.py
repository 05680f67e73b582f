"""Pins: what is pinned stays, in memory and on disk, until its time has come; and pins stay within their share."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, CannotPin, PinRefused, StoreError
from cakekv.store.disk import DiskStore
from cakekv.store.eviction import POLICIES, policy_named
from cakekv.store.maintenance.collect import garbage
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.pins import Pin, Pins
from cakekv.store.striped import StripedStore

from .chunks import SIZE, chunk_of, key_of
from .disk_folder import fill

NAME = key_of("a prompt")
OTHER = key_of("another prompt")


class Clock:
    """The clock on the wall, which tests may turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import time

        self._time = time.time
        self._ahead = 0.0
        monkeypatch.setattr(time, "time", lambda: self._time() + self._ahead)

    def turn(self, seconds: float) -> None:
        self._ahead += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(params=["memory", "disk"])
def opened(request: pytest.FixtureRequest, folder: Path) -> Callable[..., Any]:
    def made(chunks: int | None = 8, **options: Any) -> Any:
        capacity = None if chunks is None else chunks * SIZE
        return MemoryStore(capacity, **options) if request.param == "memory" else DiskStore(folder, capacity, **options)

    return made


def keys(*numbers: int) -> list[Any]:
    return [key_of(number) for number in numbers]


def held(store: Any, *numbers: int) -> list[bool]:
    return [size is not None for size in store.lookup(keys(*numbers))]


def pin(store: Any, *numbers: int, name: Any = NAME, ttl_s: float = 60.0) -> None:
    store.pin(name, keys(*numbers), ttl_s, SIZE)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_pinned_stays(opened: Any, policy: str) -> None:
    store = opened(evict=policy_named(policy))
    fill(store, *range(4))
    pin(store, 0, 1)
    fill(store, *range(10, 40))
    assert held(store, 0, 1) == [True, True]
    assert store.stats().bytes <= 8 * SIZE
    assert store.release(NAME)
    fill(store, *range(40, 80))
    assert held(store, 0, 1) == [False, False]


def test_what_is_stored_later_stays_too(opened: Any) -> None:
    store = opened()
    pin(store, 0, 1)
    fill(store, 0, 1, *range(10, 30))
    assert held(store, 0, 1) == [True, True]


def test_pins_take_up_no_more_than_their_share(opened: Any) -> None:
    store = opened(8, pin_share=0.25)
    fill(store, 0)
    pin(store, 0, 1)
    with pytest.raises(PinRefused, match="pin_share"):
        pin(store, 2, name=OTHER)
    pin(store, 1, name=OTHER)  # what is pinned already counts once
    fill(store, *range(10, 30))
    assert held(store, 0, 2) == [True, False]
    assert store.pins().bytes == 2 * SIZE
    with pytest.raises(BadInput):
        opened(pin_share=1.5)


def test_without_a_capacity_there_is_no_share(opened: Any) -> None:
    store = opened(None)
    pin(store, *range(100))
    assert store.pins().bytes == 100 * SIZE


def test_if_all_is_pinned_what_is_new_is_declined(opened: Any) -> None:
    store = opened(4, pin_share=1.0)
    fill(store, *range(4))
    pin(store, *range(4))
    assert not store.write(key_of(10), chunk_of(10))
    store.write(key_of(3), chunk_of(3))  # kept or not, what was there stays
    assert held(store, *range(4), 10) == [True] * 4 + [False]
    store.release(NAME)
    assert store.write(key_of(10), chunk_of(10))


def test_a_pin_ends_in_its_time_and_is_never_shortened(opened: Any, clock: Clock) -> None:
    store = opened()
    pin(store, 0, ttl_s=100.0)
    pin(store, 0, ttl_s=10.0)
    fill(store, 0)
    clock.turn(50.0)
    fill(store, *range(10, 30))
    assert held(store, 0) == [True]
    pin(store, 0, ttl_s=100.0)
    clock.turn(99.0)
    fill(store, *range(30, 50))
    assert held(store, 0) == [True]
    clock.turn(2.0)
    assert not store.pins().keys
    fill(store, *range(50, 70))
    assert held(store, 0) == [False]
    assert not store.release(NAME)


def test_a_clock_that_goes_backwards_keeps_nothing_for_ever(opened: Any, clock: Clock) -> None:
    store = opened()
    clock.turn(1e8)
    pin(store, 0, ttl_s=10.0)
    clock.turn(-1e8)
    fill(store, 0, *range(10, 30))
    assert held(store, 0) == [True]
    clock.turn(12.0)
    fill(store, *range(30, 50))
    assert held(store, 0) == [False]


def test_two_prompts_share_a_chunk(opened: Any) -> None:
    store = opened()
    pin(store, 0, 1)
    pin(store, 0, 2, name=OTHER)
    fill(store, 0, 1, 2)
    assert store.release(NAME)
    fill(store, *range(10, 30))
    assert held(store, 0, 1, 2) == [True, False, True]


def test_pins_and_evictions_at_once(opened: Any) -> None:
    store = opened(16)
    fill(store, *range(4))
    pin(store, *range(4))
    stop = threading.Event()

    def keep_pinning() -> None:
        while not stop.is_set():
            pin(store, 90, 91, name=OTHER)
            store.release(OTHER)

    thread = threading.Thread(target=keep_pinning)
    thread.start()
    try:
        for number in range(100, 180):
            fill(store, number)
            assert all(held(store, *range(4)))
    finally:
        stop.set()
        thread.join()


def test_deleting_is_stronger(opened: Any) -> None:
    store = opened()
    fill(store, 0)
    pin(store, 0)
    assert store.delete(keys(0)) == 1


def test_collecting_garbage_leaves_what_is_pinned(opened: Any, clock: Clock) -> None:
    store = opened()
    fill(store, 0, 1, 2)
    pin(store, 0, ttl_s=1e6)
    clock.turn(1e3)
    rubbish = garbage(store, 1e12, older_than_s=1.0, capacity=1)
    assert {chunk.key for chunk in [*rubbish.old, *rubbish.surplus]} == set(keys(1, 2))


@pytest.mark.parametrize("options", ["encrypt=KEYS", "pack=yes", "bandwidth=1GB/s", "skip_head=1", "stripe=MORE"])
def test_through_whatever_stands_before_the_tier(options: str, folder: Path, tmp_path: Path) -> None:
    keyring = tmp_path / "keys"
    keyring.write_text("ab" * 32)
    keyring.chmod(0o600)
    options = options.replace("KEYS", str(keyring)).replace("MORE", str(tmp_path / "more"))
    with open_store(f"{folder}?capacity={20 * SIZE}&{options}") as store:
        for number in (0, 1, 2):
            assert store.write(key_of(number), chunk_of(number, position=64))
        pin(store, 0, 1)
        for number in range(10, 60):
            store.write(key_of(number), chunk_of(number, position=64))
        assert held(store, 0, 1, 2) == [True, True, False]
        assert store.pins().keys == set(keys(0, 1))
        assert store.release(NAME)


def test_of_several_folders_all_keep_a_prompt_or_none(tmp_path: Path) -> None:
    roomy, tight = DiskStore(tmp_path / "a", 100 * SIZE), DiskStore(tmp_path / "b", SIZE)
    with StripedStore([roomy, tight]) as store:
        with pytest.raises(PinRefused):
            pin(store, *range(20))
        assert not store.pins().keys
        assert not roomy.pins().keys


def test_a_tiered_store_pins_where_it_can(tiered: Any, folder: Path) -> None:
    small, disk = MemoryStore(2 * SIZE), DiskStore(folder, 8 * SIZE)
    store = tiered((small,), (disk,))
    pin(store, 0, 1, 2)
    assert not small.pins().keys
    assert disk.pins().keys == set(keys(0, 1, 2))
    with pytest.raises(PinRefused):
        pin(store, *range(6), name=OTHER)


def test_a_server_cannot_pin(shared: Any, tiered: Any, folder: Path) -> None:
    pytest.importorskip("redis")
    with open_store(f"redis://127.0.0.1:{shared.valkey}?prefix={folder}:") as server:
        with pytest.raises(CannotPin, match="server"):
            pin(server, 0)
        assert not server.release(NAME)
        both = tiered((server,), (DiskStore(folder, 8 * SIZE),))
        pin(both, 0)
        assert both.pins().keys == set(keys(0))


# On disk


def test_other_processes_keep_to_it_and_may_end_it(folder: Path) -> None:
    store = DiskStore(folder, 8 * SIZE)
    fill(store, 0)
    pin(store, 0)
    run(folder, "[store.write(key_of(number), chunk_of(number)) for number in range(10, 40)]")
    assert held(store, 0) == [True]
    run(folder, "assert store.release(key_of('a prompt'))")
    assert not store.pins().keys
    fill(store, *range(50, 80))
    assert held(store, 0) == [False]


def run(folder: Path, line: str) -> None:
    program = f"""
from cakekv.store.disk import DiskStore
from tests.store.chunks import SIZE, chunk_of, key_of
store = DiskStore({str(folder)!r}, 8 * SIZE)
{line}
"""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=True)


def test_it_outlives_the_process(folder: Path) -> None:
    run(folder, "store.pin(key_of('a prompt'), [key_of(0)], 60.0, SIZE)")
    store = DiskStore(folder, 8 * SIZE)
    fill(store, 0, *range(10, 30))
    assert held(store, 0) == [True]


def test_killed_while_it_writes(folder: Path) -> None:
    """The pins are those from before or those from after, and what was half written is in nobody's way."""
    store = DiskStore(folder, 8 * SIZE)
    pin(store, 0)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run(
            folder,
            "import os; os.replace = lambda *paths: os.kill(os.getpid(), 9)\n"
            "import pathlib; pathlib.Path.replace = os.replace\n"
            "store.pin(key_of('another prompt'), [key_of(1)], 60.0, SIZE)",
        )
    assert raised.value.returncode == -signal.SIGKILL
    assert (folder / "pins.json.new").exists()
    assert store.pins().keys == set(keys(0))
    pin(store, 2, name=OTHER)
    assert store.pins().keys == set(keys(0, 2))
    (folder / "pins.json.new").write_text("half")
    assert any("half written" in sentence for sentence in store.tidy())
    assert not (folder / "pins.json.new").exists()
    assert store.pins().keys == set(keys(0, 2))


PIN = {"until": 2e9, "ttl_s": 2e8, "chunks": {key_of(0).hex(): 100}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rubbish",
        "[" * 100_000,
        "[]",
        '{"cakekv_pins": 2, "pins": {}}',
        '{"cakekv_pins": 1, "pins": []}',
        json.dumps({"cakekv_pins": 1, "pins": {"short": PIN}}),
        *(
            json.dumps({"cakekv_pins": 1, "pins": {NAME.hex(): PIN | wrong}})
            for wrong in (
                {"until": "soon"},
                {"until": 1e400},
                {"until": 10**400},
                {"ttl_s": -1},
                {"ttl_s": True},
                {"chunks": [1]},
                {"chunks": {"xyz": 1}},
                {"chunks": {key_of(0).hex(): -1}},
            )
        ),
    ],
)
def test_a_damaged_file_is_ignored_and_reported(text: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(folder, 8 * SIZE)
    (folder / "pins.json").write_text(text)
    with caplog.at_level(logging.WARNING, "cakekv"):
        fill(store, *range(20))
        assert not store.pins().keys
    assert [record.event for record in caplog.records] == ["pins_unreadable"]  # type: ignore[attr-defined]
    pin(store, 19)
    fill(store, *range(30, 50))
    assert held(store, 19) == [True]
    assert DiskStore(folder).pins().keys == set(keys(19))


def test_what_is_no_file(folder: Path) -> None:
    store = DiskStore(folder, 8 * SIZE)
    (folder / "pins.json").mkdir()
    fill(store, *range(20))
    assert not store.pins().keys
    with pytest.raises(StoreError, match="pin chunks"):
        pin(store, 0)


def test_pins_are_no_foreign_files(folder: Path) -> None:
    store = DiskStore(folder, 8 * SIZE)
    pin(store, 0)
    assert not store.tidy()


def test_pins_of_several_tiers_together() -> None:
    one = Pins({NAME: Pin(10.0, 5.0, {key_of(0): 1})})
    other = Pins({NAME: Pin(20.0, 5.0, {key_of(1): 2}), OTHER: Pin(30.0, 5.0, {key_of(0): 3})})
    both = Pins.together([one, other])
    assert both.by_name[NAME] == Pin(20.0, 5.0, {key_of(0): 1, key_of(1): 2})
    assert both.bytes == 5
