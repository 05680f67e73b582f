"""A Cake after it was closed, and calls that it cannot answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.store.memory import MemoryStore
from tests.cake.crowd import CHUNK, WAIT_S, Watched, start, tokens, until

pytestmark = pytest.mark.timeout(120)


class Letters:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "x" * len(ids)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def closed(engine: TransformersEngine, prompt: list[int], store: MemoryStore) -> Cake:
    cake = Cake(engine, Letters(), store, chunk_tokens=CHUNK)
    cake.prefill(prompt)
    cake.close()
    return cake


USES: dict[str, Callable[[Cake, list[int]], Any]] = {
    "prefill": lambda cake, prompt: cake.prefill(prompt),
    "generate": lambda cake, prompt: cake.generate(prompt),
    "stream": lambda cake, prompt: list(cake.stream(prompt)),
    "plan": lambda cake, prompt: cake.plan(prompt),
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_cake_refuses_to_be_used(closed: Cake, prompt: list[int], use: str) -> None:
    for _ in range(2):
        with pytest.raises(BadInput, match="this Cake is closed"):
            USES[use](closed, prompt)
        closed.close()
        assert closed.wait_saved().saved_chunks == 20


def test_a_closed_cake_without_a_store(engine: TransformersEngine) -> None:
    with Cake(engine) as cake:
        pass
    cake.close()
    assert cake.wait_saved().saved_chunks == 0
    with pytest.raises(BadInput, match="closed"):
        cake.prefill([1, 2, 3])


def test_a_stream_that_goes_on_after_close_is_refused(engine: TransformersEngine, prompt: list[int]) -> None:
    with Cake(engine, Letters(), chunk_tokens=CHUNK) as cake:
        pieces, forgotten = cake.stream(prompt), cake.stream(prompt)
        next(pieces)
        next(forgotten)
    with pytest.raises(BadInput, match="closed"):
        next(pieces)
    del forgotten


def test_close_lets_other_threads_finish(watched: Watched, store: MemoryStore) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def before(*_: Any) -> None:
        begun.set()
        go_on.wait(WAIT_S)

    watched.before = before
    cake = Cake(watched, store=store, chunk_tokens=CHUNK)
    asked = start("asked", lambda: cake.generate(tokens(1, 100), max_new_tokens=3))
    begun.wait(WAIT_S)
    closings = [start("closes", cake.close) for _ in range(2)]
    until(lambda: cake._executor.closed)
    with pytest.raises(BadInput, match="closed"):
        cake.generate([1, 2, 3])
    assert not any(closing.done() for closing in closings)
    go_on.set()
    assert len(asked.result(WAIT_S).token_ids) == 3
    for closing in closings:
        closing.result(WAIT_S)
    assert cake.wait_saved().saved_chunks == 7


@pytest.mark.parametrize("where", ["cakekv-call", "cakekv-load"])
def test_a_callback_that_calls_the_cake_is_refused(
    engine: TransformersEngine, closed: Cake, store: MemoryStore, prompt: list[int], where: str
) -> None:
    """It would wait for the very restore that waits for it."""
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:

        def progress(_: Any) -> None:
            if threading.current_thread().name.startswith(where):
                cake.plan(prompt)

        mode: Any = "load" if where == "cakekv-load" else "compute"
        with pytest.raises(BadInput, match=r"from within|on_progress"):
            cake.prefill(prompt, mode=mode, save=False, on_progress=progress)
        assert len(cake.generate(prompt, max_new_tokens=2).token_ids) == 2


def test_without_threads_to_spare_everything_is_computed_and_counted(
    engine: TransformersEngine, closed: Cake, store: MemoryStore, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=4).token_ids
    longer = prompt + tokens(3, 3 * CHUNK)

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "_start_new_thread", refuse)
            patch.setattr("_thread.start_new_thread", refuse)
            answer = cake.generate(prompt, max_new_tokens=4, mode="load", save=False)
            assert answer.token_ids == expected
            assert "no thread can be started" in answer.report.notes[0], "to look up"
            cake.prefill(longer)
            saved = cake.wait_saved()
            assert saved.failed_chunks == len(longer) // CHUNK
            assert "no thread can be started" in str(saved.error)
        answer = cake.generate(prompt, max_new_tokens=4, mode="load", save=False)
        assert answer.token_ids == expected
        assert answer.report.loaded_tokens == 20 * CHUNK
        cake.prefill(longer)
    assert cake.wait_saved().saved_chunks == 3


def test_without_threads_to_load_with_everything_is_computed(
    engine: TransformersEngine, closed: Cake, store: MemoryStore, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_thread = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("cakekv-load"):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=4).token_ids
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        answer = cake.generate(prompt, max_new_tokens=4, mode="load", save=False)
        assert answer.token_ids == expected
        assert any("no thread can be started" in reason for reason in answer.report.miss_reasons())
        assert not cake._arms.loader._workers[0]


def test_an_interrupt_while_a_worker_is_started_loses_no_count(
    engine: TransformersEngine, closed: Cake, store: MemoryStore, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Thread.start` waits until the thread runs, so that is where an interrupt often comes."""
    start_thread = threading.Thread.start

    def interrupt(thread: threading.Thread) -> None:
        start_thread(thread)
        if thread.name.startswith("cakekv-load"):
            raise KeyboardInterrupt

    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        for _ in range(5):
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    cake.prefill(prompt, mode="load")
            until(lambda: cake._arms.loader._workers == [0])
        assert cake.prefill(prompt, mode="load").report.loaded_tokens == 20 * CHUNK
        until(lambda: cake._arms.loader._workers == [0])
