"""A prefix of which a first token reads what its queries select."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from cakekv import BadInput, Cake
from cakekv.chunk import ALIGNMENT, header_bytes_of, read_header
from cakekv.decode.clusterkv import ClusterKV
from cakekv.embedded.recalling import Planned, Recaller
from cakekv.embedded.sidecars import Sidecars
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.prompt import Tokenized
from cakekv.results import Progress
from cakekv.store.base import ChunkReader
from cakekv.store.memory import MemoryStore
from cakekv.store.wrapper import WrappedReader, WrappedStore
from tests.cake.test_forks import in_child
from tests.matrix.models import build

CHUNK = 8
PLAIN = "clusterkv:budget=24,sinks=4,tokens=4,span=32,full_layers=1"
LAZY = PLAIN + ",lazy=yes"
PROMPT = random.Random(5).choices(range(3, 128), k=229)
"""7 spans that are stored, and less than a chunk."""
SPANS = 224
STEPS = 12


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    engine = TransformersEngine(build("qwen2", getattr(torch, request.param)))
    engine._stop_tokens = frozenset()
    return engine


@pytest.fixture
def store(engine: TransformersEngine) -> MemoryStore:
    store = MemoryStore()
    with cake_of(engine, store) as cake:
        cake.prefill(PROMPT)
        assert cake.wait_saved().failed_chunks == 0
    assert store.stats().chunks == 28 + 7
    return store


def cake_of(engine: TransformersEngine, store: Any, decode: str = LAZY, **options: Any) -> Cake:
    return Cake(engine, None, store, chunk_tokens=CHUNK, decode=decode, **options)


def sidecars(store: MemoryStore) -> list[ChunkKey]:
    """Those of the prompt, from the first."""
    found = []
    for chunk in store:
        data = bytes_of(store, chunk.key)
        header = read_header(data, len(data))
        if header.tokens == 32:
            found.append((header.position, chunk.key))
    return [key for _, key in sorted(found)]


def bytes_of(store: MemoryStore, key: ChunkKey) -> memoryview:
    with store.open(key) as reader:
        data = memoryview(bytearray(reader.size))
        reader.read_into(data, 0)
    return data


def expected(engine: TransformersEngine, front: int = 0) -> list[torch.Tensor]:
    """Logits of the first steps, all of whose prompt is there from the start."""
    sight = Cake(engine, None, None, chunk_tokens=CHUNK, decode=LAZY).options.decode
    assert isinstance(sight, ClusterKV)
    whole = engine.new_cache(len(PROMPT) + STEPS)
    engine.compute(whole, PROMPT[:SPANS], 0)
    known = engine.look(whole, PROMPT[:SPANS], sight).stored
    spans = {number: layer.memo["spans"] for number, layer in enumerate(known) if layer.memo}
    view = engine.begin_recall(whole, SPANS, sight, spans)
    logits = [engine.compute(view, PROMPT[SPANS:], SPANS)]
    for step in range(STEPS):
        logits.append(engine.compute(view, [int(logits[-1].argmax())], len(PROMPT) + step))
    return logits


def test_what_is_selected_is_read_first_and_the_rest_behind(engine: TransformersEngine, store: MemoryStore) -> None:
    with cake_of(engine, store) as cake:
        prefill = cake.prefill(PROMPT, mode="load", room=STEPS)
        report = prefill.report
        assert (report.recalled_tokens, report.loaded_tokens, report.computed_tokens) == (SPANS, SPANS, 5)
        assert report.after_lossy_tokens == 5
        assert not report.exact
        assert report.decode == cake.options.decode.recipe if cake.options.decode else False
        total = sum(len(bytes_of(store, key)) for key in sidecars(store))
        rows = SPANS * engine.layout.token_bytes
        assert 0 < report.first_read_bytes < total - rows // 4
        logits = expected(engine)
        assert torch.equal(prefill.logits, logits[0])
        for step in range(STEPS):
            assert torch.equal(
                engine.compute(prefill.cache, [int(logits[step].argmax())], len(PROMPT) + step), logits[step + 1]
            )
        assert prefill.recall is not None
        prefill.recall.settle()
        assert report.first_read_bytes < sum(report.bytes_by_tier.values()) <= total
        assert {load.outcome for load in report.loads} == {"placed"}
        computed = Cake(engine, None, None, chunk_tokens=CHUNK).prefill(PROMPT).cache
        for recalled, own in zip(prefill.cache.stored, computed.stored, strict=True):
            for number, plane in enumerate(recalled.planes):
                assert torch.equal(plane[:, :SPANS], own.plane(number)[0, :, :SPANS])


def test_an_answer_is_that_of_the_same_view(engine: TransformersEngine, store: MemoryStore) -> None:
    with cake_of(engine, store) as cake:
        answer = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
        assert answer.token_ids == [int(one.argmax()) for one in expected(engine)[:STEPS]]
        assert answer.report.recalled_tokens == SPANS
        again = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
        assert again.token_ids == answer.token_ids
        assert cake.wait_saved().saved_chunks == 0
    assert store.stats().chunks == 28 + 7


def test_a_front_is_computed_while_the_back_waits(
    engine: TransformersEngine, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = Recaller.planned

    def later(*given: Any) -> Planned | None:
        plan = planned(*given)
        assert plan is not None
        return plan._replace(front=32)

    monkeypatch.setattr(Recaller, "planned", later)
    with cake_of(engine, store) as cake:
        prefill = cake.prefill(PROMPT, mode="load", room=STEPS)
        assert (prefill.report.recalled_tokens, prefill.report.computed_tokens) == (SPANS - 32, 37)
        assert torch.allclose(prefill.logits, expected(engine)[0], rtol=0.1, atol=0.1)
        assert prefill.report.met_at == 32


def test_more_tokens_than_there_is_room_for(engine: TransformersEngine, store: MemoryStore) -> None:
    with cake_of(engine, store) as cake:
        prefill = cake.prefill(PROMPT, mode="load")
        logits = expected(engine)
        for step in range(STEPS):
            token = int(logits[step].argmax())
            assert torch.equal(engine.compute(prefill.cache, [token], len(PROMPT) + step), logits[step + 1])


class Failing(WrappedStore):
    """Reads of sidecars fail, in some way, once there were so many."""

    def __init__(self, inner: MemoryStore, how: str, after: int) -> None:
        super().__init__(inner)
        self.how, self.left = how, after
        self.bad = set(sidecars(inner))
        self.read_bytes = 0
        self.announced: dict[ChunkKey, list[tuple[int, int]]] = {}
        self.before: Callable[[ChunkKey], None] = lambda key: None
        self._counting = threading.Lock()

    def open(self, key: ChunkKey) -> ChunkReader:
        return FailingReader(self, self._inner.open(key), key)

    def count(self, size: int) -> int:
        with self._counting:
            self.read_bytes += size
        return size


class FailingReader(WrappedReader):
    def __init__(self, store: Failing, inner: ChunkReader, key: ChunkKey) -> None:
        super().__init__(inner)
        self.store, self.key = store, key

    def announce(self, start: int, end: int) -> None:
        self.store.announced.setdefault(self.key, []).append((start, end))

    def read_into(self, buffer: memoryview, offset: int) -> int:
        self.store.before(self.key)
        if self.key not in self.store.bad:
            return self.store.count(self._inner.read_into(buffer, offset))
        self.store.left -= 1
        count = self._inner.read_into(buffer, offset)
        if self.store.left >= 0:
            return self.store.count(count)
        if self.store.how == "error":
            raise StoreError("the link is down")
        if self.store.how == "cut":
            return 0
        buffer[count // 2] ^= 1
        return self.store.count(count)


@pytest.mark.parametrize("how", ["flip", "cut", "error"])
@pytest.mark.parametrize("after", [0, 4, 15, 24, 26, 40, 80, 120, 200, 300])
def test_damage_costs_a_restore_and_no_answer(
    engine: TransformersEngine, store: MemoryStore, how: str, after: int
) -> None:
    lazily = [int(one.argmax()) for one in expected(engine)[:STEPS]]
    whole = cake_of(engine, store).generate(PROMPT, max_new_tokens=STEPS, mode="both").token_ids
    failing = Failing(store, how, after)
    with cake_of(engine, failing) as cake:
        answer = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
        assert len(answer.token_ids) == STEPS
        if answer.report.recalled_tokens:
            assert answer.token_ids[0] == lazily[0]
            assert any("restored again" in note for note in answer.report.notes) == (failing.left < 0)
        else:
            assert answer.token_ids == whole
            assert answer.report.notes
            vain = [load for load in answer.report.loads if load.outcome != "placed"]
            assert (answer.report.wasted_bytes > 0) == any(load.tokens == 32 for load in vain) or after < 10
        wait_for_no_readers()
        assert sum(answer.report.bytes_by_tier.values()) == failing.read_bytes
        failing.left = 1 << 30
        cake.wait_saved()
        assert cake.generate(PROMPT, max_new_tokens=STEPS, mode="load").token_ids == lazily


@pytest.mark.parametrize("where", ["header", "groups", "rows", "end"])
def test_a_damaged_sidecar_is_written_again(engine: TransformersEngine, store: MemoryStore, where: str) -> None:
    key = sidecars(store)[1]
    data = bytes_of(store, key)
    good = bytes(data)
    header = read_header(data, len(data))
    layers = len(engine.layout.layers)
    assert header_bytes_of(data[:ALIGNMENT], len(data)) == header.offsets[0]
    at = {"header": 60, "groups": header.offsets[1] + 9, "rows": header.offsets[layers] + 3, "end": -1}[where]
    if where == "end":
        store.write(key, data[: header.offsets[-1] // ALIGNMENT * ALIGNMENT])
    else:
        data[at] ^= 8
        store.write(key, data)
    with cake_of(engine, store) as cake:
        answer = cake.generate(PROMPT, max_new_tokens=2, mode="load")
        assert answer.report.notes
        cake.wait_saved()
    assert bytes(bytes_of(store, key)) == good


def test_several_at_once(engine: TransformersEngine, store: MemoryStore) -> None:
    lazily = [int(one.argmax()) for one in expected(engine)[:STEPS]]
    with cake_of(engine, store) as cake, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: cake.generate(PROMPT, max_new_tokens=STEPS, mode="load"), range(8))
        assert [answer.token_ids for answer in answers] == [lazily] * 8
    wait_for_no_readers()


@pytest.mark.parametrize("parallel_reads", [1, 4])
def test_all_recalls_share_a_few_readers(engine: TransformersEngine, store: MemoryStore, parallel_reads: int) -> None:
    """While all of them wait for a tier that delivers nothing, and one of them may hold the compute arm."""
    lazily = [int(one.argmax()) for one in expected(engine)[:STEPS]]
    gated, gate, waiting = Failing(store, "error", 1 << 30), threading.Event(), threading.Semaphore(0)
    gated.parallel_reads = parallel_reads

    def wait(key: ChunkKey) -> None:
        if threading.current_thread().name.startswith("cakekv-recall"):
            waiting.release()
            assert gate.wait(60)

    gated.before = wait
    with cake_of(engine, gated) as cake, ThreadPoolExecutor(12) as pool:
        answers = pool.map(lambda _: cake.generate(PROMPT, max_new_tokens=STEPS, mode="load"), range(12))
        readers = cake._recaller._readers[0]
        until = monotonic() + 60
        while len(readers._open) < 12:
            assert monotonic() < until
            sleep(0.01)
        for _ in range(parallel_reads):
            assert waiting.acquire(timeout=60)
        assert sum(thread.name.startswith("cakekv-recall") for thread in threading.enumerate()) == parallel_reads
        gate.set()
        assert [answer.token_ids for answer in answers] == [lazily] * 12


def test_a_first_token_goes_before_what_is_read_behind_others(engine: TransformersEngine, store: MemoryStore) -> None:
    other = [*PROMPT[:8][::-1], *PROMPT[8:]]
    with cake_of(engine, store) as cake:
        cake.prefill(other)
        cake.wait_saved()
    gated, gate = Failing(store, "error", 1 << 30), threading.Event()
    gated.parallel_reads = 1
    order: list[ChunkKey] = []

    def wait(key: ChunkKey) -> None:
        if any(
            reading.has_begun for reading in list(cake._recaller._open)
        ) and threading.current_thread().name.startswith("cakekv-recall"):
            order.append(key)
            assert gate.wait(60)

    with cake_of(engine, gated) as cake, ThreadPoolExecutor(1) as pool:
        first_keys = {key.key for key in cake.options.decode.beside(cake._stored.keys_of(whole(PROMPT)), CHUNK)}
        gated.before = wait
        first = cake.prefill(PROMPT, mode="load")
        second = pool.submit(cake.prefill, other, mode="load")
        readers = cake._recaller._readers[0]
        until = monotonic() + 60
        while len(readers._open) < 2 and first.report.loads[0].outcome != "placed":
            assert monotonic() < until
            sleep(0.01)
        gate.set()
        second.result(60)
        assert first.recall is not None
        first.recall.settle()
    assert order[0] in first_keys
    others = [index for index, key in enumerate(order) if key not in first_keys]
    assert others[0] <= 2 < len(order) - len(others), "at most what was in flight, before it came"


def whole(prompt: list[int]) -> Tokenized:
    return Tokenized(prompt)


def test_a_beginning_is_one_request(engine: TransformersEngine, store: MemoryStore) -> None:
    watched = Failing(store, "error", 1 << 30)
    for _ in range(2):
        watched.announced.clear()
        with cake_of(engine, watched) as cake:
            cake.prefill(PROMPT, mode="load")
        for key in sidecars(store):
            data = bytes_of(store, key)
            end = read_header(data, len(data)).offsets[len(engine.layout.layers)]
            (one,) = [(start, stop) for start, stop in watched.announced[key] if start < end]
            assert one[0] == 0
            assert end <= one[1] < end + ALIGNMENT + 2048


def test_a_beginning_longer_than_expected_is_read_in_more(
    engine: TransformersEngine, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sidecars, "_expected", lambda *_: 0)
    with cake_of(engine, store) as cake:
        assert cake.prefill(PROMPT, mode="load").report.recalled_tokens == SPANS


def test_recalls_teach_what_a_tier_costs(engine: TransformersEngine, store: MemoryStore) -> None:
    slow = Failing(store, "error", 1 << 30)
    with cake_of(engine, slow) as cake:
        cost = cake.load_costs[0]
        assert not cost.known
        cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
        assert cost.measured
        before = cost.request_s + cost.seconds(1 << 14)
        slow.before = lambda key: sleep(max(0.02, 3 * before))
        cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
        assert cost.request_s + cost.seconds(1 << 14) > 1.5 * before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_knows_that_nobody_reads(engine: TransformersEngine, store: MemoryStore) -> None:
    gated, gate, has_begun = Failing(store, "error", 1 << 30), threading.Event(), threading.Event()

    def wait(key: ChunkKey) -> None:
        if has_begun.is_set() and threading.current_thread().name.startswith("cakekv-recall"):
            assert gate.wait(60)

    with cake_of(engine, gated) as cake:
        gated.before = lambda key: (sleep(0.01), wait(key))[1]
        has_begun_before = cake.prefill(PROMPT, mode="load")
        has_begun.set()
        assert has_begun_before.recall is not None
        if has_begun_before.report.loads[0].outcome != "reading":
            pytest.skip("all was read at once")

        def child() -> None:
            assert has_begun_before.recall is not None
            with pytest.raises(StoreError, match="forked"):
                has_begun_before.recall.settle()
            has_begun_before.recall.stop()

        with cake._recaller._readers[0].lock:
            in_child(child)
        gate.set()
        has_begun_before.recall.settle()


def test_who_stops_early_stops_the_reading(engine: TransformersEngine, store: MemoryStore) -> None:
    slow = Failing(store, "error", 1 << 30)
    cake = cake_of(engine, slow)
    prefill = cake.prefill(PROMPT, mode="load")
    cake.close()
    wait_for_no_readers()
    if prefill.report.loads[0].outcome != "placed":
        with pytest.raises(StoreError, match="prefill the prompt again"):
            engine.compute(prefill.cache, [5], len(PROMPT))


@pytest.mark.parametrize("after", [0, 3, 7, 10, 14])
def test_an_interrupt_ends_the_reading(engine: TransformersEngine, store: MemoryStore, after: int) -> None:
    """Before the first token, while a sidecar's beginning, or rows, are read."""
    failing, reads = Failing(store, "error", 1 << 30), 0

    def interrupt(key: ChunkKey) -> None:
        nonlocal reads
        if key in failing.bad:
            reads += 1
            if reads == after + 1:
                signal.pthread_kill(main, signal.SIGINT)
                sleep(0.05)

    main = threading.get_ident()
    with cake_of(engine, failing) as cake:
        wanted = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load").token_ids
        wait_for_no_readers()
        failing.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
        wait_for_no_readers()
        assert cake.generate(PROMPT, max_new_tokens=STEPS, mode="load").token_ids == wanted


def wait_for_no_readers() -> None:
    until = monotonic() + 10
    while any(thread.name.startswith("cakekv-recall") for thread in threading.enumerate()):
        assert monotonic() < until, "threads are left"
        sleep(0.01)


def test_what_is_not_stored_is_computed_exactly_and_saved(engine: TransformersEngine, store: MemoryStore) -> None:
    longer = [*PROMPT, *PROMPT[:20]]
    with cake_of(engine, store) as cake:
        assert cake.prefill(longer, mode="load").report.recalled_tokens == 0
        assert cake.wait_saved().saved_chunks == 3
        assert cake.prefill(longer, mode="load").report.recalled_tokens == SPANS
        assert cake.prefill(longer, mode="compute").report.recalled_tokens == 0


def test_progress_is_told(engine: TransformersEngine, store: MemoryStore) -> None:
    told: list[Progress] = []
    with cake_of(engine, store) as cake:
        cake.prefill(PROMPT, mode="load", on_progress=told.append)
    assert [(one.mode, one.front, one.back, one.prefix_tokens) for one in told] == [("load", len(PROMPT), 0, SPANS)]
    assert told[0].bands == [(0, SPANS, "loaded"), (SPANS, len(PROMPT), "computed")]


def test_without_threads_it_is_restored_whole(
    engine: TransformersEngine, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name.startswith("cakekv-recall"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with cake_of(engine, store) as cake:
        report = cake.prefill(PROMPT, mode="load").report
    assert (report.recalled_tokens, report.loaded_tokens) == (0, SPANS)
    assert any("no thread" in note for note in report.notes)


def test_a_plan_says_so(engine: TransformersEngine, store: MemoryStore) -> None:
    with cake_of(engine, store) as cake:
        runs = cake.plan(PROMPT, mode="load")
    assert [(run.start, run.tokens, run.how) for run in runs] == [(0, SPANS, "memory"), (SPANS, 5, "compute")]


def test_a_cache_ends_where_the_context_does(engine: TransformersEngine, store: MemoryStore) -> None:
    with cake_of(engine, store) as cake:
        prefill = cake.prefill(PROMPT, mode="load")
        with pytest.raises(BadInput, match="does not fit a cache of 256 tokens"):
            engine.compute(prefill.cache, [5] * 28, len(PROMPT))


def test_both_kinds_of_sidecars_stand_side_by_side(engine: TransformersEngine, store: MemoryStore) -> None:
    with cake_of(engine, store, PLAIN) as cake:
        cake.prefill(PROMPT)
        cake.wait_saved()
    assert store.stats().chunks == 28 + 7 + 7


@pytest.mark.parametrize("recipe", ["clusterkv:lazy=yes", "clusterkv:lazy=maybe,span=64"])
def test_it_needs_a_span(recipe: str, engine: TransformersEngine) -> None:
    with pytest.raises(BadInput, match="lazy"):
        cake_of(engine, None, recipe)


def test_a_window_is_refused() -> None:
    with pytest.raises(BadInput, match="sliding window"):
        cake_of(TransformersEngine(build("mistral")), None)


@pytest.fixture(autouse=True)
def no_readers() -> Iterator[None]:
    yield
    wait_for_no_readers()
