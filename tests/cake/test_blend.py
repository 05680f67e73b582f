"""Prompts whose reused documents are blended: the same as by hand, wherever documents stand, whatever goes wrong."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.embedded.loader import Loader
from cakekv.engine.base import Move
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, StoreError
from cakekv.keys import ChunkKey
from cakekv.load import pieces
from cakekv.prompt import Document
from cakekv.reuse import reuse_named
from cakekv.reuse.blend import Blend
from cakekv.store.base import ChunkReader
from cakekv.store.memory import MemoryStore
from tests.cake.crowd import start, tokens
from tests.cake.poisoned import Poisoned
from tests.cake.test_adapters import with_adapters
from tests.cake.test_reuse import CHUNK, LONG, OTHER, QUESTION, SHORT, SYSTEM, flat, full, how, learned, make
from tests.matrix.models import build
from tests.matrix.restoring import gather

SOME, ALL = "blend:recompute=0.3", "blend:recompute=1"


@pytest.fixture
def store(engine: Any) -> MemoryStore:
    """Has all three documents."""
    store = MemoryStore()
    learned(engine, store, SHORT, LONG, OTHER)
    return store


def reused(parts: Any) -> int:
    return sum(len(part.content) for part in parts if isinstance(part, Document))


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "mistral", "gemma3", "gemma3n", "phi", "cohere", "llama4"])
def test_the_result_is_that_of_blending_by_hand(name: str) -> None:
    engine = Poisoned(build(name))
    one, other = ([token % 120 + 3 for token in document] for document in (LONG, OTHER))
    parts: Any = [SYSTEM, Document(one), Document(other), QUESTION]
    prompt = flat(parts)
    by_hand = TransformersEngine.new_cache(engine, len(prompt))
    engine.compute(by_hand, SYSTEM, 0)
    position = len(SYSTEM)
    for document in (one, other):
        alone = TransformersEngine.new_cache(engine, len(document))
        engine.compute(alone, document, 0)
        move = Move(len(document), 0, position, engine.turnable())
        engine.place_moved(by_hand, position, len(document), gather(engine, alone, 0, len(document)), move)
        position += len(document)
    way = reuse_named(SOME)
    assert isinstance(way, Blend)
    expected, positions = engine.blend(by_hand, prompt[len(SYSTEM) :], len(SYSTEM), position, way)
    stored = MemoryStore()
    learned(engine, stored, one, other)
    whole = full(engine, prompt)
    with make(engine, stored, SOME) as cake:
        prefill = cake.prefill(parts, mode="load")
    report = prefill.report
    assert torch.allclose(prefill.logits, expected, atol=2e-4 * float(expected.abs().max()))
    assert report.loaded_tokens == report.reused_tokens == reused(parts)
    assert report.blended_tokens == round(0.3 * reused(parts)) == len(positions) - len(QUESTION)
    assert not report.exact
    with make(engine, stored, ALL) as cake:
        again = cake.prefill(parts, mode="load")
    assert torch.allclose(again.logits, whole, atol=2e-4 * float(whole.abs().max()))
    assert again.report.exact
    assert (again.report.loaded_tokens, again.report.blended_tokens) == (reused(parts), reused(parts))


LAYOUTS: list[Any] = [
    [Document(LONG), Document(OTHER), QUESTION],
    [SYSTEM, Document(SHORT), Document(OTHER), Document(LONG), QUESTION],
    [SYSTEM, Document(LONG), QUESTION, Document(OTHER), QUESTION],
    [SYSTEM, Document(LONG), Document(OTHER)],
    [SYSTEM, Document(SHORT)],
    [SYSTEM, Document([LONG[0]]), Document(OTHER), QUESTION * 30],
    [SYSTEM * 9, Document(LONG), tokens(7, 3 * CHUNK), Document(OTHER), SYSTEM],
]


@pytest.mark.parametrize("layered", [True, False])
@pytest.mark.parametrize("parts", LAYOUTS, ids=range(len(LAYOUTS)))
def test_wherever_documents_stand(engine: Any, store: Any, parts: Any, layered: bool) -> None:
    """With all computed again, it is a full prefill; with some, the answer depends on nothing but the prompt."""
    prompt = flat(parts)
    expected = full(engine, prompt)
    with make(engine, store, ALL, layered_finish=layered, learn=False) as cake:
        prefill = cake.prefill(parts, mode="load", save=False)
        assert torch.allclose(prefill.logits, expected, atol=1e-4)
        assert prefill.report.exact
        assert prefill.report.loaded_tokens > 0
        assert prefill.report.after_lossy_tokens == 0
        assert not prefill.report.positions
        rest = cake.generate(parts, max_new_tokens=6, mode="load", save=False).token_ids
    with Cake(engine, chunk_tokens=CHUNK) as cake:
        assert cake.generate(prompt, max_new_tokens=6).token_ids == rest
    with make(engine, store, SOME, layered_finish=layered, learn=False) as cake:
        first = cake.prefill(parts, mode="load", save=False)
        again = cake.prefill(parts, mode="load", save=False)
    assert torch.equal(first.logits, again.logits)
    assert not first.logits.isnan().any()
    report = first.report
    assert 0 < report.blended_tokens <= report.reused_tokens * 0.5
    assert sum(run.tokens for run in report.positions) == len(prompt)
    assert json.loads(report.to_json())["blended_tokens"] == report.blended_tokens


def test_what_is_computed_from_the_front_is_left_as_it_is(engine: Any, store: Any) -> None:
    with make(engine, store, None) as cake:  # its own prefix wins
        cake.prefill([SYSTEM, Document(LONG), QUESTION])
    with make(engine, store, SOME) as cake:
        prefill = cake.prefill([SYSTEM, Document(LONG), Document(OTHER), QUESTION], mode="load")
    exact = (len(SYSTEM) + len(LONG)) // CHUNK * CHUNK
    assert how(prefill.report)[0] == (0, exact, "exact")
    assert prefill.report.blended_tokens == round(0.3 * (len(SYSTEM) + len(LONG) + len(OTHER) - exact))
    whole = full(engine, flat([SYSTEM, Document(LONG)]))
    with Cake(engine, chunk_tokens=CHUNK) as cake:
        right = cake.prefill(flat([SYSTEM, Document(LONG), Document(OTHER), QUESTION]))
    assert whole.shape == prefill.logits.shape
    for one, other in zip(prefill.dynamic_cache().layers, right.dynamic_cache().layers, strict=True):
        assert torch.allclose(one.keys[:, :, :exact], other.keys[:, :, :exact], atol=1e-4)


def test_with_no_document_stored_the_prompt_is_computed_exactly(engine: Any) -> None:
    parts: Any = [SYSTEM, Document(LONG), Document(OTHER), QUESTION]
    with make(engine, MemoryStore(), SOME) as cake:
        prefill = cake.prefill(parts)
        assert prefill.report.exact
        assert (prefill.report.reuse, prefill.report.blended_tokens) == ("", 0)
        assert torch.allclose(prefill.logits, full(engine, flat(parts)), atol=1e-4)
        cake.wait_saved()
        assert cake.prefill([QUESTION, *parts], mode="load").report.blended_tokens


@pytest.mark.parametrize("way", [SOME, ALL])
def test_nothing_behind_what_was_reused_is_saved(engine: Any, store: Any, way: str) -> None:
    parts: Any = [SYSTEM * 7, Document(LONG), Document(OTHER), QUESTION * 20]
    with make(engine, store, way) as cake:
        cake.prefill(parts, mode="load")
        assert cake.wait_saved().saved_chunks == len(SYSTEM * 7) // CHUNK


def test_damaged_chunks_are_computed(engine: Any, store: Any) -> None:
    class Damaged(MemoryStore):
        asked = 0

        def open(self, key: ChunkKey) -> ChunkReader:
            self.asked += 1
            if self.asked % 3 == 0:
                raise StoreError("torn off")
            return store.open(key)  # type: ignore[no-any-return]

        def lookup(self, keys: Any) -> Any:
            return store.lookup(keys)

    parts: Any = [SYSTEM, Document(LONG), Document(OTHER), QUESTION]
    with make(engine, Damaged(), ALL, learn=False) as cake:
        for _ in range(3):
            prefill = cake.prefill(parts, mode="load", save=False)
            assert prefill.report.recomputed_tokens
            assert torch.allclose(prefill.logits, full(engine, flat(parts)), atol=1e-4)
            assert prefill.report.exact


class Paced(Poisoned):
    """Computes and blends no faster than 2 ms a token, so that slow loads are worth something."""

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        time.sleep(0.002 * len(token_ids))
        return super().compute(cache, token_ids, start, gate)


@pytest.mark.parametrize("fails", [False, True])
def test_documents_that_arrive_layer_by_layer(engine: Any, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The blend waits for each layer's part of them; if one does not come, it begins again as if nothing had been."""
    monkeypatch.setattr(pieces, "_LEAST_READ_BYTES", 1)
    piece = threading.local()

    class Slow(MemoryStore):
        fails_in_pieces = False

        def open(self, key: ChunkKey) -> ChunkReader:
            time.sleep(0.02)
            if self.fails_in_pieces and getattr(piece, "now", 0) >= 2:
                raise StoreError("torn off")
            return super().open(key)

    original = Loader._perform

    def perform(self: Any, loading: Any, load: Any) -> None:
        piece.now = load.group or 0
        original(self, loading, load)

    monkeypatch.setattr(Loader, "_perform", perform)
    stored, document = Slow(), tokens(4, 20 * CHUNK)
    parts: Any = [SYSTEM, Document(document), QUESTION * 60]
    learned(engine, stored, document)
    with make(engine, stored, ALL, layered_finish=False) as cake:
        expected = cake.prefill(parts, mode="load", save=False).logits
    with make(Paced(engine.model), stored, ALL, learn=False) as cake:
        cake.prefill(parts, mode="both", save=False)  # learns what both arms cost
        stored.fails_in_pieces = fails
        came = []
        for _ in range(3):
            prefill = cake.prefill(parts, mode="both", save=False)
            assert torch.allclose(prefill.logits, expected, atol=1e-4)
            came.append(any(load.group is not None for load in prefill.report.loads))
    assert any(came)


def test_several_prompts_at_once(engine: Any, store: Any) -> None:
    prompts: Any = [
        [SYSTEM, Document(LONG), Document(OTHER), QUESTION],
        [QUESTION, Document(OTHER), SYSTEM, Document(LONG), SYSTEM],
        SYSTEM * 20,
    ]
    with make(engine, store, SOME) as cake:
        alone = [cake.prefill(prompt, mode="load", save=False).logits for prompt in prompts]
        again = [partial(cake.prefill, prompts[number % 3], mode="load", save=False) for number in range(6)]
        calls = [start(str(number), call) for number, call in enumerate(again)]
        for number, call in enumerate(calls):
            assert torch.allclose(call.result().logits, alone[number % 3], atol=1e-4)


def test_an_interrupt_within_a_blend_ends_that_request_only(engine: Any, store: Any) -> None:
    class Interrupted(Poisoned):
        now = True

        def forward_of(self, model: Any, cache: Any, token_ids: Any, **arguments: Any) -> Any:
            output = super().forward_of(model, cache, token_ids, **arguments)
            if self.now and model is not self.model and len(token_ids) > 2 * CHUNK:
                raise KeyboardInterrupt
            return output

    watched = Interrupted(engine.model)
    parts: Any = [SYSTEM, Document(LONG), Document(OTHER), QUESTION]
    with make(watched, store, ALL) as cake:
        with pytest.raises(KeyboardInterrupt):
            cake.prefill(parts, mode="load")
        watched.now = False
        assert torch.allclose(cake.prefill(parts, mode="load").logits, full(engine, flat(parts)), atol=1e-4)


def test_compute_is_not_taken_to_be_as_slow_as_a_blend(engine: Any, store: Any) -> None:
    parts: Any = [Document(SHORT), Document(LONG), Document(OTHER), QUESTION]
    with make(engine, store, SOME) as cake:
        cake.compute_cost.observe(0, 2 * CHUNK, 0.02)
        before = cake.compute_cost.shape
        cake.prefill(parts, mode="load", save=False)
        assert cake.compute_cost.shape == before


def test_each_adapter_blends_its_own() -> None:
    model = with_adapters("red", "blue")
    one = [token % 120 + 3 for token in LONG]
    parts: Any = [SYSTEM, Document(one), QUESTION]
    stored = MemoryStore()
    for name in ("red", "blue"):
        model.set_adapter(name)
        engine = TransformersEngine(model)
        learned(engine, stored, one)
        with make(engine, stored, ALL) as cake:
            prefill = cake.prefill(parts, mode="load")
        assert prefill.report.blended_tokens == len(one)
        assert torch.allclose(prefill.logits, full(engine, flat(parts)), atol=1e-3)


def test_a_model_that_cannot_be_blended_is_refused_with_the_reason(engine: Any) -> None:
    with pytest.raises(BadInput, match="no layer 3 to check"):
        make(engine, None, "blend:check=3")
    with pytest.raises(BadInput, match="this model's cannot be"):
        make(TransformersEngine(build("gpt2")), None, "blend")
