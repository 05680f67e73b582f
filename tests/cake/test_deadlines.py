"""A tier that hangs, in any of its operations, costs a restore its deadline and nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from cakekv.cake import Cake, Progress
from cakekv.chunk import ChunkShape
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.store.base import ChunkReader, Store
from cakekv.store.faulty import FaultyStore, parse_faults
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.redis import RedisStore
from cakekv.store.tiered import TieredStore, TierPlan
from cakekv.store.wrapper import WrappedStore
from tests.store.servers import suspend, valkey

CHUNK = 16
CHUNKS = 20
DEADLINE_S = 0.3
HOUR = "seed:1,hang_s:3600s"

pytestmark = pytest.mark.timeout(50)  # less than the real server's own timeout below


@pytest.fixture(scope="module")
def filled(engine: TransformersEngine, prompt: list[int]) -> MemoryStore:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
    return store


@pytest.fixture
def expected(engine: TransformersEngine, prompt: list[int]) -> list[int]:
    return Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=8).token_ids


@contextmanager
def hanging(inner: Store, faults: str) -> Iterator[FaultyStore]:
    """The store, with faults; whoever hangs in it is let go in the end."""
    store = FaultyStore(inner, parse_faults(f"{HOUR},{faults}"))
    try:
        yield store
    finally:
        store._closed.set()


def restore(cake: Cake, prompt: list[int], **options: Any) -> Any:
    return cake.generate(prompt, max_new_tokens=8, **options)


@pytest.mark.parametrize("mode", ["auto", "load"])
@pytest.mark.parametrize("operation", ["lookup", "open", "read"])
def test_a_hanging_tier(
    engine: TransformersEngine,
    prompt: list[int],
    filled: MemoryStore,
    expected: list[int],
    operation: str,
    mode: str,
) -> None:
    with (
        hanging(filled, f"{operation}.hang:1") as store,
        Cake(engine, store=store, chunk_tokens=CHUNK, deadline_s=DEADLINE_S) as cake,
    ):
        for turn in range(2):
            answer = restore(cake, prompt, mode=mode, save=False)
            assert answer.token_ids == expected
            assert answer.report.loaded_tokens == 0
            if operation == "lookup":
                words = f"no answer within {DEADLINE_S}" if not turn else "still owes an answer"
                assert words in answer.report.notes[0]
            elif mode == "load" and not turn:
                assert answer.report.miss_reasons()["late"] == CHUNK, "a tier that never answered is not asked twice"
        assert sum(store.injected.values()) <= 1 + 2 * (operation != "lookup"), "it was not asked again and again"


def test_a_hanging_tier_beside_a_sound_one(
    engine: TransformersEngine, prompt: list[int], filled: MemoryStore, expected: list[int]
) -> None:
    with (
        hanging(filled, "lookup.hang:1") as ill,
        Cake(engine, store=[ill, filled], chunk_tokens=CHUNK, deadline_s=DEADLINE_S) as cake,
    ):
        answer = restore(cake, prompt, mode="load", save=False)
    assert answer.token_ids == expected
    assert answer.report.loaded_tokens == CHUNKS * CHUNK


def test_a_tier_that_hangs_in_writing_holds_nobody_up(
    engine: TransformersEngine, prompt: list[int], expected: list[int]
) -> None:
    inner = MemoryStore()
    with hanging(inner, "write.hang:1") as store:
        queue = 4 * ChunkShape(CHUNK, engine.layout.segment_bytes(CHUNK)).total_bytes
        with Cake(engine, store=store, chunk_tokens=CHUNK, deadline_s=DEADLINE_S, save_queue=queue) as cake:
            assert restore(cake, prompt).token_ids == expected
            saved = cake.wait_saved()
            assert saved.failed_chunks == CHUNKS + 1, "the answer's, too"
            assert saved.error == f"the memory store has not taken a chunk for more than {DEADLINE_S} s"
            assert restore(cake, prompt).token_ids == expected
            thread = cake._saver._thread
        assert inner.stats().chunks == 0
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive(), "once let go it ends, without a store that is closed"
    assert inner.stats().chunks == 0


class Hanging(WrappedStore):
    """Hangs in one of the operations that `FaultyStore` leaves alone, until `well` is set."""

    def __init__(self, inner: Store, operation: str) -> None:
        super().__init__(inner)
        self.well = threading.Event()
        self.operation = operation

    def hang(self, operation: str) -> None:
        if operation == self.operation:
            self.well.wait()

    def identities(self) -> dict[str, dict[str, str]]:
        self.hang("identities")
        return super().identities()

    def remember_identity(self, root: str, fields: Any) -> None:
        self.hang("remember_identity")
        super().remember_identity(root, fields)

    def open(self, key: Any) -> ChunkReader:
        reader = super().open(key)
        close = reader.close

        def hang_and_close() -> None:
            self.hang("close")
            close()

        reader.close = hang_and_close
        return reader


@pytest.mark.parametrize("operation", ["identities", "remember_identity", "close"])
def test_other_operations_that_hang(
    engine: TransformersEngine, prompt: list[int], filled: MemoryStore, expected: list[int], operation: str
) -> None:
    store = Hanging(filled if operation == "close" else MemoryStore(), operation)
    try:
        with Cake(engine, store=store, chunk_tokens=CHUNK, deadline_s=DEADLINE_S) as cake:
            answer = restore(cake, prompt, mode="load")
            assert answer.token_ids == expected
            if operation == "identities":
                assert "could not be asked whose chunks it holds: no answer" in answer.report.notes[0]
            elif operation == "close":
                assert answer.report.miss_reasons()["late"] == CHUNK
    finally:
        store.well.set()


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("-inf"), True, "30", None, [1.0]])
def test_a_deadline_is_a_positive_number(engine: TransformersEngine, deadline_s: Any) -> None:
    with pytest.raises(BadInput, match="deadline_s"):
        Cake(engine, deadline_s=deadline_s)


# A real server that is stopped


@pytest.fixture
def stopped(
    engine: TransformersEngine, prompt: list[int], tmp_path: Path
) -> Iterator[tuple[RedisStore, Callable[[], None], Callable[[], None]]]:
    """A Valkey store that holds the prompt, and what stops its server and lets it go on."""
    with valkey(tmp_path) as (port, process), RedisStore("127.0.0.1", port, timeout_s=60) as store:
        with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
            cake.prefill(prompt)
        yield store, lambda: process.send_signal(signal.SIGSTOP), lambda: process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGCONT)


def loads_again(cake: Cake, prompt: list[int]) -> None:
    """It is asked, and answers, as before."""
    until = monotonic() + 20
    while (answer := restore(cake, prompt, mode="load", save=False)).report.loaded_tokens != CHUNKS * CHUNK:
        assert monotonic() < until, answer.report.notes
        sleep(0.05)


def test_a_server_stopped_before_it_is_asked(
    engine: TransformersEngine, prompt: list[int], expected: list[int], stopped: Sequence[Any]
) -> None:
    store, stop, go_on = stopped
    with Cake(engine, store=store, chunk_tokens=CHUNK, deadline_s=DEADLINE_S) as cake:
        stop()
        answer = restore(cake, prompt, save=False)
        assert answer.token_ids == expected
        assert "no answer within" in answer.report.notes[0]
        go_on()
        loads_again(cake, prompt)


@pytest.mark.parametrize("timeout_s", [0.3, 1.0])
@pytest.mark.parametrize("tiered", [False, True])
def test_a_server_that_hangs_after_the_look_up_is_waited_for_once(
    engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path, timeout_s: float, tiered: bool
) -> None:
    class Stopped(WrappedStore):
        """Its server stops when it has said what it holds."""

        def lookup(self, keys: Any) -> Any:
            found = super().lookup(keys)
            suspend(process)
            return found

    with (
        valkey(tmp_path) as (port, process),
        RedisStore("127.0.0.1", port) as sound,
        RedisStore("127.0.0.1", port, timeout_s=timeout_s) as store,
    ):
        with Cake(engine, store=sound, chunk_tokens=CHUNK) as cake:
            cake.prefill(prompt)
        stopped = Stopped(store)
        one = TieredStore([TierPlan(Member(lambda: stopped, "redis"))]) if tiered else stopped
        with Cake(engine, store=one, chunk_tokens=CHUNK) as cake:
            answer = restore(cake, prompt, mode="load", save=False)
        assert answer.token_ids == expected
        report = answer.report
        assert (report.loaded_tokens, report.recomputed_tokens) == (0, CHUNKS * CHUNK)
        assert len(report.loads) <= store.parallel_reads, "no chunk was waited for after those"
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("mode", ["auto", "load"])
def test_a_server_stopped_in_mid_restore(
    engine: TransformersEngine, prompt: list[int], expected: list[int], stopped: Sequence[Any], mode: str
) -> None:
    store, stop, go_on = stopped
    with Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=CHUNK, deadline_s=DEADLINE_S) as cake:
        loads_again(cake, prompt)

        times: list[float] = []

        def stop_soon(progress: Progress) -> None:
            loaded = sum(end - start for start, end, state in progress.bands if state == "loaded")
            if loaded >= 3 * CHUNK and not times:
                times.append(monotonic())
                stop()

        answer = restore(cake, prompt, mode=mode, save=False, on_progress=stop_soon)
        assert answer.token_ids == expected
        assert answer.report.loaded_tokens >= 3 * CHUNK
        if mode == "load":
            assert answer.report.miss_reasons()["late"] > 0
        go_on()
        loads_again(cake, prompt)


@pytest.mark.parametrize("deadline_s", [float("inf"), 1e300, 1e10, 10**400, 7])
def test_a_deadline_may_be_as_long_as_one_likes(
    engine: TransformersEngine, prompt: list[int], filled: MemoryStore, expected: list[int], deadline_s: float
) -> None:
    """Also where something has to be waited for."""
    with (
        FaultyStore(filled, parse_faults("seed:1,slow:1,slow_s:30ms")) as store,
        Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=CHUNK, deadline_s=deadline_s) as cake,
    ):
        answer = restore(cake, prompt, mode="load")
        assert answer.token_ids == expected
        assert answer.report.loaded_tokens == CHUNKS * CHUNK
        cake.prefill(prompt[1:])
        assert cake.wait_saved().failed_chunks == 0
