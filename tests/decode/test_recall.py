"""A prefix of which a first token reads what its queries select."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from cakekv import BadInput, Cake
from cakekv.chunk import ALIGNMENT, header_bytes_of, read_header
from cakekv.decode.clusterkv import ClusterKV
from cakekv.embedded.recalling import Planned, Recaller
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.results import Progress
from cakekv.store.base import ChunkReader
from cakekv.store.memory import MemoryStore
from cakekv.store.wrapper import WrappedReader, WrappedStore
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

    def open(self, key: ChunkKey) -> ChunkReader:
        reader = self._inner.open(key)
        return FailingReader(self, reader) if key in self.bad else reader


class FailingReader(WrappedReader):
    def __init__(self, store: Failing, inner: ChunkReader) -> None:
        super().__init__(inner)
        self.store = store

    def read_into(self, buffer: memoryview, offset: int) -> int:
        self.store.left -= 1
        count = self._inner.read_into(buffer, offset)
        if self.store.left >= 0:
            return count
        if self.store.how == "error":
            raise StoreError("the link is down")
        if self.store.how == "cut":
            return 0
        buffer[count // 2] ^= 1
        return count


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


def test_who_stops_early_stops_the_reading(engine: TransformersEngine, store: MemoryStore) -> None:
    slow = Failing(store, "error", 1 << 30)
    cake = cake_of(engine, slow)
    prefill = cake.prefill(PROMPT, mode="load")
    cake.close()
    wait_for_no_readers()
    if prefill.report.loads[0].outcome != "placed":
        with pytest.raises(StoreError, match="prefill the prompt again"):
            engine.compute(prefill.cache, [5], len(PROMPT))


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
