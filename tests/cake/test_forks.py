"""A process that is forked from one that has used a Cake, as preloading servers do it: it answers, saves and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.chunk import verify_chunk
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from cakekv.store.wrapper import WrappedStore
from tests.cake.crowd import CHUNK, tokens
from tests.embedded.chatting import talker, tokenizer

HANG_S = 60.0

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks"),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]


def in_child(work: Callable[[], None]) -> None:
    """Run it in a forked process, in which it must neither fail nor hang."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    ends = monotonic() + HANG_S
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        sleep(0.01)
    assert found[1] == 0, "the child failed; see above"


@pytest.fixture
def expected(engine: TransformersEngine, prompt: list[int]) -> list[int]:
    return Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=4).token_ids


def test_parent_and_child_both_load_and_save(
    engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path
) -> None:
    longer = prompt + tokens(1, 5 * CHUNK)
    with Cake(engine, store=str(tmp_path), chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()

        def child() -> None:
            answer = cake.generate(prompt, max_new_tokens=4, mode="load")
            assert answer.token_ids == expected
            assert answer.report.loaded_tokens == 20 * CHUNK
            cake.prefill(longer)
            saved = cake.wait_saved()
            assert (saved.saved_chunks, saved.failed_chunks) == (5 + 1, 0)
            cake.close()
            cake.close()
            with pytest.raises(BadInput, match="closed"):
                cake.prefill(prompt)

        in_child(child)
        assert cake.prefill(longer, mode="load").report.loaded_tokens == 25 * CHUNK
        assert cake.prefill(tokens(2, 50)).report.loaded_tokens == 0
        assert cake.wait_saved().saved_chunks == 23
    for file in tmp_path.glob("chunks/*/*.chunk"):
        verify_chunk(memoryview(file.read_bytes()))


def test_a_child_of_a_busy_parent(
    engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path
) -> None:
    """Whatever other threads hold at the moment of the fork."""
    stop = threading.Event()
    wrong: list[Any] = []
    with Cake(engine, store=str(tmp_path), chunk_tokens=CHUNK, max_span_tokens=CHUNK) as cake:

        def serve(seed: int) -> None:
            number = seed
            while not stop.is_set():
                number += 2
                answer = cake.generate(prompt[: -number % 300 + 1], max_new_tokens=2)
                cake.prefill(tokens(number, 3 * CHUNK))
                if len(answer.token_ids) != 2:
                    wrong.append(answer)

        threads = [threading.Thread(target=serve, args=(seed,), daemon=True) for seed in range(2)]
        for thread in threads:
            thread.start()

        def child(number: int) -> None:
            assert cake.generate(prompt, max_new_tokens=4).token_ids == expected
            cake.prefill(tokens(1000 + number, 2 * CHUNK))
            assert cake.wait_saved().failed_chunks == 0
            cake.close()

        for number in range(8):
            in_child(lambda number=number: child(number))  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join(HANG_S)
            assert not thread.is_alive()
    assert not wrong


def test_a_child_that_only_ends(engine: TransformersEngine, prompt: list[int]) -> None:
    """The parent's queue and stores are none of its business, whatever state they are in."""
    gate = threading.Event()

    class Gated(MemoryStore):
        def write(self, key: Any, data: memoryview) -> bool:
            gate.wait()
            return super().write(key, data)

    with Cake(engine, store=Gated(), chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)

        def child() -> None:
            assert cake.wait_saved().saved_chunks == 0
            with cake:
                pass

        in_child(child)
        gate.set()
        assert cake.wait_saved().saved_chunks == 20


def test_a_child_uses_stores_that_survive_a_fork(
    engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path
) -> None:
    memory = MemoryStore()
    with DiskStore(tmp_path) as disk, Cake(engine, store=[memory, disk], chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()

        def child() -> None:
            answer = cake.generate(prompt, max_new_tokens=4, mode="load")
            assert answer.token_ids == expected
            assert answer.report.loaded_tokens == 20 * CHUNK
            cake.prefill(tokens(6, 3 * CHUNK))
            assert cake.wait_saved().saved_chunks == 3 + 1
            assert memory.stats().chunks == 23 + 1
            cake.close()

        in_child(child)
        assert memory.stats().chunks == 20


@pytest.mark.parametrize("why", ["connections", "a lock"])
def test_a_child_of_a_cake_whose_store_does_not_survive_says_that_it_does_not_save(
    engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path, why: str
) -> None:
    disk, memory = DiskStore(tmp_path), MemoryStore()
    store = WrappedStore(disk) if why == "connections" else memory  # nothing is known of the former
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()

        def child() -> None:
            for _ in range(2):
                answer = cake.generate(prompt, max_new_tokens=4)
                assert answer.token_ids == expected
                (note,) = answer.report.notes
                assert "Nothing is loaded or saved here: this process was forked" in note
                assert "give URLs" in note
            assert cake.wait_saved().saved_chunks == 0
            cake.close()

        with memory._lock:  # as a thread that is writing holds it
            in_child(child)
        assert cake.prefill(prompt, mode="load").report.loaded_tokens == 20 * CHUNK


def test_a_child_whose_store_is_gone_answers_and_says_so(
    engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    with Cake(engine, store=str(folder), chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()

        def child() -> None:
            (folder / "cakekv-store.json").write_text("damaged")
            answer = cake.generate(prompt, max_new_tokens=4)
            assert answer.token_ids == expected
            assert "cannot be opened again" in answer.report.notes[0]
            cake.close()

        in_child(child)


def test_children_of_children_and_closed_cakes(engine: TransformersEngine, prompt: list[int], tmp_path: Path) -> None:
    cake = Cake(engine, store=str(tmp_path), chunk_tokens=CHUNK)
    cake.prefill(prompt)

    def child() -> None:
        cake.prefill(tokens(3, 40))
        in_child(grandchild)
        cake.close()
        in_child(refused)

    def grandchild() -> None:
        cake.prefill(tokens(4, 40))
        assert cake.wait_saved().saved_chunks == 2

    def refused() -> None:
        with pytest.raises(BadInput, match="closed"):
            cake.prefill(tokens(5, 40))
        assert cake.wait_saved().failed_chunks == 0

    in_child(child)
    cake.close()
    in_child(refused)


def test_multiprocessing(engine: TransformersEngine, prompt: list[int], expected: list[int], tmp_path: Path) -> None:
    with Cake(engine, store=str(tmp_path), chunk_tokens=CHUNK) as cake:
        assert cake.generate(prompt, max_new_tokens=4).token_ids == expected
        cake.wait_saved()

        def child(results: Any) -> None:
            results.put((cake.generate(prompt, max_new_tokens=4).token_ids, cake.wait_saved().failed_chunks))

        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        children = [context.Process(target=child, args=(results,)) for _ in range(2)]
        for one in children:
            one.start()
        for one in children:
            one.join(HANG_S)
            assert one.exitcode == 0
        assert [results.get() for _ in children] == [(expected, 0)] * 2


def test_a_child_computes_with_several_threads(engine: TransformersEngine, prompt: list[int], tmp_path: Path) -> None:
    """OpenMP hangs in a child whose forking thread has used it; requests compute in threads that came later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with Cake(engine, store=str(tmp_path), chunk_tokens=CHUNK) as cake:
                expected = cake.generate(prompt, max_new_tokens=4).token_ids

                def child() -> None:
                    assert cake.generate(prompt, max_new_tokens=4, mode="compute").token_ids == expected

                in_child(child)
        finally:
            torch.set_num_threads(before)


def test_a_session_that_is_answering_in_the_parent_can_be_gone_on_with() -> None:
    made = tokenizer()
    with Cake(talker(made), made, "memory://", chunk_tokens=CHUNK) as cake:
        session = cake.session([{"role": "user", "content": "abcd ef"}])
        pieces = session.stream(max_new_tokens=30)
        text = next(pieces)

        def work() -> None:
            assert session.send(max_new_tokens=3).token_ids
            pieces.close()  # type: ignore[attr-defined]
            session.send("a", max_new_tokens=3)

        in_child(work)
        text += "".join(pieces)
        assert session.messages[-1] == {"role": "assistant", "content": text}
