"""Several requests at once: each gets what it gets alone, in the order of the policy, whatever befalls the others."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
import torch

from cakekv.arbiter import Arbiter, Request
from cakekv.cake import Cake
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey, chunk_keys
from cakekv.load import pieces
from cakekv.restore.priority import POLICIES, RequestState, open_policy
from cakekv.store.base import ChunkReader
from cakekv.store.memory import MemoryStore

CHUNK = 16
WAIT_S = 60.0
"""A safety net: what is waited for happens in milliseconds."""


class Watched(TransformersEngine):
    """Knows who computes: `spans` are (thread, first position, tokens). Calls `before` with each."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.spans: list[tuple[str, int, int]] = []
        self.before: Callable[[str, int, int], None] = lambda name, start, tokens: None
        self.computing = 0
        self.buffers = 0

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        name = threading.current_thread().name
        self.spans.append((name, start, len(token_ids)))
        self.before(*self.spans[-1])
        return super().compute(cache, token_ids, start, gate)

    def new_cache(self, capacity: int) -> TwoEndedCache:
        cache = super().new_cache(capacity)
        for layer in cache.stored:
            for region in layer.regions:
                region.fill_(float("nan"))
        return cache

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
        self.before_open: Callable[[ChunkKey], None] = lambda key: None
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
    """Run a request in a thread of this name."""
    future: Future[Any] = Future()

    def run() -> None:
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


@pytest.fixture
def watched(engine: TransformersEngine) -> Watched:
    return Watched(engine.model)


def filled(engine: TransformersEngine, *prompts: Sequence[int]) -> Watching:
    store = Watching()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        for prompt in prompts:
            cake.prefill(prompt)
    return store


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_each_gets_what_it_gets_alone(engine: TransformersEngine, watched: Watched, policy: str) -> None:
    prompts = [tokens(seed, length) for seed, length in enumerate((325, 500, 90, 330, 17, 260))]
    alone = [Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
    store = filled(engine, prompts[0], prompts[1], prompts[3])
    jobs = [(number, mode) for mode in ("auto", "both", "load", "compute") for number in range(len(prompts))]
    with Cake(watched, store=store, chunk_tokens=CHUNK, max_span_tokens=64, policy=policy) as cake:

        def answer(job: tuple[int, Any]) -> list[int]:
            number, mode = job
            got = cake.generate(prompts[number], max_new_tokens=8, mode=mode)
            assert got.report.computed_tokens + got.report.loaded_tokens == len(prompts[number])
            assert got.report.recomputed_tokens == 0
            return got.token_ids

        with nothing_left(cake, watched):
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(answer, jobs))
            cake.wait_saved()
    assert answers == [alone[number] for number, _ in jobs]
    assert store.most_at_once <= store.parallel_reads


@pytest.mark.parametrize(
    ("policy", "starvation_s", "expected"),
    [
        ("fcfs", 60.0, ["stored", "plain"]),
        ("cake", 60.0, ["stored", "plain", "stored"]),
        ("marginal_saving", 60.0, ["stored", "plain", "stored"]),
        ("cake", 0.0, ["stored", "plain"]),
    ],
)
def test_a_plain_prefill_waits_for_one_span_of_a_restore(
    engine: TransformersEngine,
    watched: Watched,
    prompt: list[int],
    policy: str,
    starvation_s: float,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless requests go by arrival: the policy says so, or the older one is past the bound."""
    store = filled(engine, prompt)
    other = tokens(1, 200)
    chosen = open_policy(policy, starvation_s)
    monkeypatch.setattr(RequestState, "patience_s", 0.0)  # it depends on what the machine costs
    with Cake(watched, store=store, chunk_tokens=CHUNK, max_span_tokens=32, policy=chosen) as cake:
        slow(cake)
        plain: list[Future[Any]] = []

        def before(name: str, first: int, count: int) -> None:
            if first == 64 and name == "stored":  # in its second span or so
                plain.append(start("plain", lambda: cake.prefill(other, save=False)))
                until(lambda: asking(cake) == 2)
            if first + count == len(prompt):
                reads.set()

        def take(arbiter: Arbiter, request: Request) -> None:
            request.woken.wait(0.01)  # long enough for another one to come in between, if it may
            original(arbiter, request)

        original = Arbiter.take
        monkeypatch.setattr(Arbiter, "take", take)
        reads = threading.Event()
        store.before_open = lambda key: reads.wait(WAIT_S) and None
        watched.before = before
        with nothing_left(cake, watched):
            stored = start("stored", lambda: cake.prefill(prompt, mode="both", save=False))
            assert stored.result(WAIT_S).report.loaded_tokens == 0
            plain[0].result(WAIT_S)
    assert watched.turns() == expected
    assert sum(1 for name, _, _ in watched.spans if name == "plain") >= 6
    assert sum(1 for name, _, _ in watched.spans if name == "stored") >= 10


def test_decodes_and_spans_alternate(engine: TransformersEngine, watched: Watched) -> None:
    """A prefill neither waits for the end of a generation, nor holds up a step by more than a span."""
    watched.stop_tokens = frozenset()
    with Cake(watched, chunk_tokens=CHUNK, max_span_tokens=32) as cake:
        first: threading.Event = threading.Event()
        second: list[Future[Any]] = []

        def before(name: str, position: int, count: int) -> None:
            if name == "decode" and position == 52:
                second.append(start("prefill", lambda: cake.prefill(tokens(2, 300))))
                until(lambda: asking(cake) == 2)
            elif name == "decode" and position > 52:
                until(lambda: second[0].done() or asking(cake) == 2)
            elif name == "prefill":
                until(lambda: first.is_set() or asking(cake) == 2)

        watched.before = before
        decode = start("decode", lambda: cake.generate(tokens(3, 50), max_new_tokens=30))
        decode.add_done_callback(lambda _: first.set())
        decode.result(WAIT_S)
        second[0].result(WAIT_S)
    begin = watched.spans.index(("decode", 52, 1))
    spans = [name for name, *_ in watched.spans[begin:]]
    end = len(spans) - spans[::-1].index("prefill")
    assert spans[:end] == ["decode", "prefill"] * (end // 2)


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "short"), ("cake", "short"), ("marginal_saving", "long")])
def test_a_tier_serves_in_the_order_of_the_policy(
    engine: TransformersEngine, watched: Watched, policy: str, first: str
) -> None:
    """A long restore's last chunks save most compute."""
    short, long = tokens(4, 6 * CHUNK + 3), tokens(5, 30 * CHUNK + 3)
    store = filled(engine, short, long)
    store.parallel_reads = 1
    with Cake(watched, store=store, chunk_tokens=CHUNK, policy=policy) as cake:
        keys = {key: name for name, ids in (("short", short), ("long", long)) for key in chunk_keys(cake.identity, ids)}
        others: list[Future[Any]] = []

        def before_open(key: ChunkKey) -> None:
            if len(store.opened) == 1:
                others.append(start("long", lambda: cake.prefill(long, mode="load")))
                until(lambda: len(cake._arms.loader._open) == 2)

        store.before_open = before_open
        loaded = [cake.prefill(short, mode="load").report.loaded_tokens]
        loaded.append(others[0].result(WAIT_S).report.loaded_tokens)
    assert loaded == [6 * CHUNK, 30 * CHUNK]
    assert store.most_at_once == 1
    whose = [keys[key] for key in store.opened]
    assert whose[0] == "short"
    if first == "short":
        assert whose == ["short"] * 6 + ["long"] * 30
    else:
        # Down to where the short one stands (its first load brought it to chunk 5), the long one's save more.
        assert whose[1:25] == ["long"] * 24
        assert whose.count("short") == 6


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
    store.write = lambda key, data: written.wait(WAIT_S) and original(key, data)  # type: ignore[method-assign]
    with Cake(watched, store=store, chunk_tokens=CHUNK, max_span_tokens=32) as cake:
        assert cake._saver is not None
        cake._saver._queue.maxsize = 2
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


def test_others_compute_while_a_suffix_waits_for_its_layers(
    engine: TransformersEngine, watched: Watched, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_LEAST_READ_BYTES", 1)
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=4)
    store = filled(engine, prompt)
    reads = threading.Event()
    store.before_open = lambda key: reads.wait(WAIT_S) and None
    with Cake(watched, store=store, chunk_tokens=CHUNK) as cake, nothing_left(cake, watched):
        cake.compute_cost.observe(0, 128, 1e4)  # so dear that everything is loaded,
        cake.load_costs[0].observe(16_000, 0.0, 5.0)  # and long enough for a layered finish
        waits = start("waits", lambda: cake.generate(prompt, max_new_tokens=4, save=False))
        until(lambda: watched.spans == [("waits", 320, 5)] and asking(cake) == 0)
        assert len(cake.generate(tokens(16, 100), max_new_tokens=4, save=False).token_ids) == 4
        assert not waits.done()
        reads.set()
        answer = waits.result(WAIT_S)
    assert answer.token_ids == expected.token_ids
    assert any(load.group is not None for load in answer.report.loads)
    assert cake.compute_cost.seconds(320, 5) > 1e-3
