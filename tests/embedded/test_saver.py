"""What waits to be saved: what may go wrong with it, and how much memory it keeps."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cakekv.cake import Cake
from cakekv.embedded.saver import Saver
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey
from cakekv.metrics import Metrics
from cakekv.store.memory import MemoryStore
from tests.cake.crowd import CHUNK, tokens, until

pytestmark = pytest.mark.timeout(120)

CHUNKS = 20


class Outcomes(Metrics):
    """Metrics that also note what became of each chunk."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.of_chunks: list[str] = []

    def add_save(self, outcome: str, size: int, seconds: float) -> None:
        super().add_save(outcome, size, seconds)
        self.of_chunks.append(outcome)


class Gated(MemoryStore):
    """Writes only while `gate` is open, and raises `error` at the first write if there is one."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.error = error

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self.gate.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().write(key, data)


@pytest.fixture
def gated() -> Iterator[Gated]:
    store = Gated()
    yield store
    store.gate.set()


def saver_of(cake: Cake) -> Saver:
    assert cake._saver is not None
    return cake._saver


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError(), "no memory", "MemoryError"),
        (ZeroDivisionError("a bug"), "crashed", "ZeroDivisionError: a bug"),
        (SystemExit("a library that gives up"), "crashed", "SystemExit: a library that gives up"),
    ],
)
def test_what_one_chunk_dies_of_ends_no_saving(
    engine: TransformersEngine,
    prompt: list[int],
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    kind: str,
    words: str,
) -> None:
    store = Gated(error)
    outcomes = Outcomes()
    with Cake(engine, store=store, chunk_tokens=CHUNK, metrics=outcomes) as cake:
        cake.prefill(prompt)
        saved = cake.wait_saved()
    assert (saved.saved_chunks, saved.failed_chunks, saved.error) == (CHUNKS - 1, 1, words)
    assert outcomes.of_chunks == [kind] + ["saved"] * (CHUNKS - 1)
    assert store.stats().chunks == CHUNKS - 1
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "save_failed"]
    assert words in record.getMessage()
    if kind == "crashed":
        assert any(record.exc_info for record in caplog.records), "a bug is shown with its traceback"


@pytest.mark.parametrize("where", ["gather", "encode", "buffers", "counting"])
def test_it_may_go_wrong_anywhere(
    engine: TransformersEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError("no room")

    store, metrics = MemoryStore(), Outcomes()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec="int8", metrics=metrics) as cake:
        with monkeypatch.context() as patch:
            if where == "gather":
                patch.setattr(engine, "gather", fail)
            elif where == "encode":
                patch.setattr(cake._coder, "encode", fail)
            elif where == "buffers":
                patch.setattr(saver_of(cake)._staging, "_allocate", fail)
            else:
                patch.setattr(metrics, "add_save", fail)
            cake.prefill(prompt)
            saved = cake.wait_saved()
        assert saved.failed_chunks + saved.saved_chunks == CHUNKS
        assert saved.failed_chunks == (0 if where == "counting" else CHUNKS)
        cake.prefill(tokens(1, 5 * CHUNK))
        assert cake.wait_saved().saved_chunks == saved.saved_chunks + 5
        assert saver_of(cake).kept_bytes == 0


def caches() -> list[TwoEndedCache]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is TwoEndedCache]


def test_one_new_chunk_each_does_not_keep_whole_caches(engine: TransformersEngine, gated: Gated) -> None:
    shared, before = tokens(2, 50 * CHUNK), len(caches())
    with Cake(engine, store=gated, chunk_tokens=CHUNK) as cake:
        cake.prefill(shared)
        cake.wait_saved()
        gated.gate.clear()
        for number in range(30):
            cake.prefill(shared + tokens(number, CHUNK + 1))
        assert len(caches()) - before <= 1
        assert saver_of(cake).kept_bytes == 30 * cake._coder.exact.total_bytes
        gated.gate.set()
        assert cake.wait_saved().saved_chunks == 80


@pytest.mark.parametrize("caches_that_fit", [0.5, 3.5])
def test_a_store_that_hangs_keeps_no_more_than_the_queue_may(
    engine: TransformersEngine, gated: Gated, caches_that_fit: float
) -> None:
    before, length = len(caches()), 20 * CHUNK
    probe = engine.new_cache(length)
    size = engine.held_bytes(probe)
    del probe
    limit = int(caches_that_fit * size)
    gated.gate.clear()
    cake = Cake(engine, store=gated, chunk_tokens=CHUNK, deadline_s=0.2, save_queue=limit)
    most = 0
    for number in range(12):
        cake.prefill(tokens(number, length))
        kept = saver_of(cake).kept_bytes
        assert 0 < kept <= limit
        most = max(most, kept)
        assert (len(caches()) - before) * size <= limit
    assert most > limit / 3, "it is made use of"
    saved = cake.wait_saved()
    assert saved.failed_chunks == 12 * CHUNKS
    cake.close()
    assert len(caches()) - before <= 1, "what was given up is let go of, all but what is being written"
    thread = saver_of(cake)._thread
    gated.gate.set()
    assert thread is not None
    thread.join(30)
    assert len(caches()) == before
    assert saver_of(cake).kept_bytes == 0
    assert cake.wait_saved().failed_chunks + cake.wait_saved().saved_chunks == 12 * CHUNKS


def test_a_slow_store_holds_the_producer_back(engine: TransformersEngine, gated: Gated) -> None:
    gated.gate.clear()
    with Cake(engine, store=gated, chunk_tokens=CHUNK, max_span_tokens=CHUNK, save_queue=1) as cake:
        done: list[int] = []
        worker = threading.Thread(target=lambda: done.append(len(cake.prefill(tokens(5, 6 * CHUNK)).token_ids)))
        worker.start()
        until(lambda: saver_of(cake).full)
        assert saver_of(cake).kept_bytes == cake._coder.exact.total_bytes
        assert not done
        gated.gate.set()
        worker.join()
        assert cake.wait_saved().saved_chunks == 6


@pytest.mark.parametrize("save_queue", [0, -1, True, 1.5, None, "much", "1 apple", float("nan")])
def test_a_queue_that_cannot_be(engine: TransformersEngine, save_queue: Any) -> None:
    with pytest.raises(BadInput, match="save_queue"):
        Cake(engine, save_queue=save_queue)


def test_a_queue_in_words(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with Cake(engine, store=MemoryStore(), save_queue="64MiB") as cake:
        assert cake.options.save_queue == 64 << 20


def test_a_thread_that_has_nothing_to_save_ends_and_the_next_begins(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Cake that is dropped without being closed leaves no thread behind."""
    monkeypatch.setattr("cakekv.embedded.saver.IDLE_S", 0.01)
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        for seed in range(3):
            cake.prefill(tokens(seed, 4 * CHUNK))
            assert cake.wait_saved().saved_chunks == 4 * (seed + 1)
            until(lambda: saver_of(cake)._thread is None)
    assert len(list(store)) == 12
