"""Several requests at once, one of them in trouble: the others get what they get alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey, chunk_keys
from tests.cake.crowd import CHUNK, WAIT_S, Watched, Watching, asking, filled, nothing_left, start, tokens, until


def test_a_store_that_fails_one_request_fails_no_other(engine: TransformersEngine, watched: Watched) -> None:
    good, bad = tokens(6, 300), tokens(7, 300)
    expected = [Cake(engine, chunk_tokens=CHUNK).generate(ids, max_new_tokens=4).token_ids for ids in (good, bad)]
    store = filled(engine, good, bad)
    with Cake(watched, store=store, chunk_tokens=CHUNK) as cake, nothing_left(cake, watched):
        broken = set(chunk_keys(cake.identity, bad))

        def fail(key: ChunkKey) -> None:
            until(lambda: len(cake._arms.loader._open) == 2 or len(store.opened) > 4)
            if key in broken:
                raise StoreError("the cable is out")

        store.before_open = fail
        answers = [
            start(name, lambda ids=ids: cake.generate(ids, max_new_tokens=4, mode="load", save=False))  # type: ignore[misc]
            for name, ids in (("good", good), ("bad", bad))
        ]
        got = [answer.result(WAIT_S) for answer in answers]
    assert [answer.token_ids for answer in got] == expected
    assert got[0].report.misses == [got[0].report.misses[-1]], "only the suffix was not stored"
    assert got[1].report.miss_reasons()["store failed: the cable is out"] == 18 * CHUNK


@pytest.mark.parametrize("where", ["compute", "tier", "progress"])
def test_what_one_request_dies_of_is_its_own(engine: TransformersEngine, watched: Watched, where: str) -> None:
    """A bug or an interrupt in one of three, in the middle of its work."""
    prompts = {name: tokens(seed, 300) for seed, name in enumerate(("dies", "stored", "plain"), start=8)}
    expected = {name: Cake(engine, chunk_tokens=CHUNK).generate(ids).token_ids for name, ids in prompts.items()}
    store = filled(engine, prompts["dies"], prompts["stored"])
    with Cake(watched, store=store, chunk_tokens=CHUNK, max_span_tokens=32) as cake, nothing_left(cake, watched):
        doomed = set(chunk_keys(cake.identity, prompts["dies"]))

        def before(name: str, first: int, count: int) -> None:
            until(lambda: cake._arms.arbiter._numbers >= 3)
            if where == "compute" and name == "dies":
                raise KeyboardInterrupt

        def before_open(key: ChunkKey) -> None:
            if where == "tier" and key in doomed:
                raise ZeroDivisionError("a bug")

        def progress(_: Any) -> None:
            if where == "progress" and threading.current_thread().name.startswith("cakekv-load"):
                raise ZeroDivisionError("a bug")

        watched.before, store.before_open = before, before_open
        answers = {
            name: start(
                name,
                lambda name=name, ids=ids: cake.generate(  # type: ignore[misc]
                    ids, mode="both", save=False, on_progress=progress if name == "dies" else None
                ),
            )
            for name, ids in prompts.items()
        }
        with pytest.raises(KeyboardInterrupt if where == "compute" else ZeroDivisionError):
            answers.pop("dies").result(WAIT_S)
        for name, answer in answers.items():
            assert answer.result(WAIT_S).token_ids == expected[name]
        watched.before = lambda *_: None
        store.before_open = lambda key: None
        assert cake.generate(prompts["dies"], save=False).token_ids == expected["dies"]


def test_an_answer_that_nobody_reads_to_its_end_holds_up_nobody(watched: Watched) -> None:
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "x" * len(ids)

    with Cake(watched, Letters(), chunk_tokens=CHUNK) as cake:
        answer = cake.stream(tokens(11, 40))
        next(answer)
        assert len(cake.generate(tokens(12, 40), max_new_tokens=3).token_ids) == 3
        assert asking(cake) == 0


def test_others_compute_while_one_waits_for_a_slow_disk(watched: Watched) -> None:
    store = Watching()
    written = threading.Event()
    original = store.write
    store.write = lambda key, data: written.wait(WAIT_S) and original(key, data)
    with Cake(watched, store=store, chunk_tokens=CHUNK, max_span_tokens=32, save_queue=1) as cake:  # which is one chunk
        held_up = start("saving", lambda: cake.prefill(tokens(13, 300)))
        try:
            until(lambda: cake._saver is not None and cake._saver.full and asking(cake) == 0)
            assert len(cake.generate(tokens(14, 100), max_new_tokens=3, save=False).token_ids) == 3
            assert not held_up.done()
        finally:
            written.set()
        held_up.result(WAIT_S)
        assert cake.wait_saved().saved_chunks == 18


def test_a_tier_that_hangs_is_not_waited_for_twice(engine: TransformersEngine, watched: Watched) -> None:
    ids = tokens(15, 100)
    expected = Cake(engine, chunk_tokens=CHUNK).generate(ids, max_new_tokens=4).token_ids
    store = filled(engine, ids)
    answers = threading.Event()
    with Cake(watched, store=store, chunk_tokens=CHUNK) as cake, nothing_left(cake, watched):
        cake.load_costs[0].observe(16_000, 0.0, 1e-3)  # so that two seconds are late
        store.before_open = lambda key: answers.wait(WAIT_S) and None
        first = cake.generate(ids, max_new_tokens=4, mode="load", save=False)
        assert first.report.miss_reasons()["late"] == 4 * CHUNK
        second = cake.generate(ids, max_new_tokens=4, mode="load", save=False)
        assert any("not asked" in note for note in second.report.notes)
        assert second.report.computed_tokens == len(ids)
        assert len(store.opened) == store.parallel_reads
        answers.set()
        until(lambda: not cake._arms.hangs(0))
        third = cake.generate(ids, max_new_tokens=4, mode="load", save=False)
        assert third.report.loaded_tokens == 6 * CHUNK
    assert [answer.token_ids for answer in (first, second, third)] == [expected] * 3


def test_many_requests_at_a_tier_that_hangs_hold_few_buffers(engine: TransformersEngine, watched: Watched) -> None:
    prompts = [tokens(seed, 60 + seed) for seed in range(20, 32)]
    with Cake(engine, chunk_tokens=CHUNK) as plain:
        expected = [plain.generate(ids, max_new_tokens=2).token_ids for ids in prompts]
    store = filled(engine, *prompts)
    reads = threading.Event()
    store.before_open = lambda key: reads.wait(WAIT_S) and None
    store.opened.clear()
    with Cake(watched, store=store, chunk_tokens=CHUNK, deadline_s=0.3) as cake:
        try:
            asked = [
                start(str(ids), lambda ids=ids: cake.generate(ids, max_new_tokens=2, mode="load", save=False))  # type: ignore[misc]
                for ids in prompts
            ]
            assert [one.result(WAIT_S).token_ids for one in asked] == expected
            assert store.parallel_reads <= len(store.opened) <= 2 * store.parallel_reads
            assert watched.buffers <= len(store.opened)
        finally:
            reads.set()
        until(lambda: not any(cake._arms.loader._in_flight))
        assert cake.generate(prompts[0], max_new_tokens=2, mode="load").report.loaded_tokens > 0
