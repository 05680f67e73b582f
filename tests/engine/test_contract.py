"""What every engine keeps to (`cakekv.engine.base`), and that a `Cake` restores, saves and plans with it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cakekv.cake import Cake
from cakekv.engine.base import Engine
from cakekv.engine.sharing import LayerMap
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.keys import chunk_keys
from cakekv.store.memory import MemoryStore
from tests.engine.toy import ToyEngine
from tests.matrix.models import build

CHUNK = 16
CHUNKS = 5
PREFIX = CHUNKS * CHUNK
PROMPT = random.Random(3).choices(range(3, 90), k=PREFIX + 5)

ENGINES: dict[str, Callable[[], Engine[Any, Any]]] = {
    "toy": ToyEngine,
    "transformers": lambda: TransformersEngine(build("llama")),
    "sharing": lambda: TransformersEngine(build("llama"), LayerMap(((0, 2),))),
}
"""Each makes an engine of the same weights whenever it is called. Add one, and every test here runs for it."""


@pytest.fixture(scope="module", params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(name: str) -> Engine[Any, Any]:
    return ENGINES[name]()


def numbers(logits: Any) -> np.ndarray[Any, Any]:
    return np.asarray(logits, dtype=np.float64)


def computed(engine: Engine[Any, Any], *cuts: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """A cache with the whole prompt in it, computed in spans that begin at `cuts`; and the last logits."""
    cache = engine.new_cache(len(PROMPT))
    for start, end in pairwise([0, *cuts, len(PROMPT)]):
        logits = engine.compute(cache, PROMPT[start:end], start)
    return cache, numbers(logits)


def gathered(engine: Engine[Any, Any], cache: Any, chunk: int) -> list[memoryview]:
    segments = [engine.staging(size)[:size] for size in engine.layout.segment_bytes(CHUNK)]
    engine.gather(cache, chunk * CHUNK, CHUNK, segments)
    return segments


def alike(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return np.allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_what_a_span_computes_does_not_depend_on_how_the_prompt_is_cut(engine: Engine[Any, Any]) -> None:
    _, whole = computed(engine)
    assert whole.shape == (engine.vocabulary_size,)
    for cuts in ((1,), (PREFIX,), (16, 48), tuple(range(7, len(PROMPT), 7))):
        assert alike(computed(engine, *cuts)[1], whole)


def test_a_cache_is_filled_from_both_ends_in_any_order(engine: Engine[Any, Any]) -> None:
    source, whole = computed(engine)
    cache, chunks = engine.new_cache(len(PROMPT)), list(range(2, CHUNKS))
    for chunk in reversed(chunks):
        segments = gathered(engine, source, chunk)
        assert engine.place(cache, chunk * CHUNK, CHUNK, segments) == sum(engine.layout.segment_bytes(CHUNK))
    engine.compute(cache, PROMPT[: 2 * CHUNK], 0)
    assert alike(numbers(engine.compute(cache, PROMPT[PREFIX:], PREFIX)), whole)


def test_what_is_placed_is_what_was_gathered(engine: Engine[Any, Any]) -> None:
    source, _ = computed(engine)
    cache = engine.new_cache(len(PROMPT))
    segments = gathered(engine, source, 1)
    for layer in range(len(segments)):  # as a layered finish brings them
        one: list[memoryview | None] = [None] * len(segments)
        one[layer] = segments[layer]
        assert engine.place(cache, CHUNK, CHUNK, one) == len(segments[layer])
    assert [bytes(segment) for segment in gathered(engine, cache, 1)] == [bytes(segment) for segment in segments]
    assert len({bytes(segment) for segment in segments}) == len(segments), "each layer has its own"


def test_a_chunk_that_is_not_the_prompts_is_noticed(engine: Engine[Any, Any]) -> None:
    source, whole = computed(engine)
    cache = engine.new_cache(len(PROMPT))
    engine.compute(cache, PROMPT[:PREFIX], 0)
    engine.place(cache, 0, CHUNK, gathered(engine, source, 1))
    assert not alike(numbers(engine.compute(cache, PROMPT[PREFIX:], PREFIX)), whole)


def test_a_gate_is_asked_before_each_layer_reads_what_is_before_the_span(engine: Engine[Any, Any]) -> None:
    source, whole = computed(engine)
    chunks = [gathered(engine, source, chunk) for chunk in range(CHUNKS)]
    cache, passed = engine.new_cache(len(PROMPT)), list[int]()

    def gate(layer: int) -> None:
        passed.append(layer)
        for number, segments in enumerate(chunks):
            late: list[memoryview | None] = [None] * len(segments)
            late[layer] = segments[layer]
            engine.place(cache, number * CHUNK, CHUNK, late)

    assert alike(numbers(engine.compute(cache, PROMPT[PREFIX:], PREFIX, gate)), whole)
    assert passed == list(range(len(engine.layout.layers)))


def test_a_gate_may_end_the_computation_and_it_can_begin_again(engine: Engine[Any, Any]) -> None:
    class Lost(Exception):
        pass

    def gate(layer: int) -> None:
        raise Lost

    _, whole = computed(engine)
    cache = engine.new_cache(len(PROMPT))
    engine.compute(cache, PROMPT[:PREFIX], 0)
    with pytest.raises(Lost):
        engine.compute(cache, PROMPT[PREFIX:], PREFIX, gate)
    assert alike(numbers(engine.compute(cache, PROMPT[PREFIX:], PREFIX)), whole)


def test_a_region_may_be_gathered_later(engine: Engine[Any, Any]) -> None:
    cache = engine.new_cache(len(PROMPT))
    engine.compute(cache, PROMPT[: 2 * CHUNK], 0)
    now, gather = gathered(engine, cache, 1), engine.gatherer(cache, CHUNK, CHUNK)
    engine.compute(cache, PROMPT[2 * CHUNK :], 2 * CHUNK)
    segments = [engine.staging(size)[:size] for size in engine.layout.segment_bytes(CHUNK)]
    gather(segments)
    assert [bytes(segment) for segment in segments] == [bytes(segment) for segment in now]


def test_an_identity_names_the_model_and_all_that_it_is_asked_for(name: str, engine: Engine[Any, Any]) -> None:
    mine = engine.identity(CHUNK)
    assert mine.dtype in ("float32", "bfloat16", "float16")
    assert ENGINES[name]().identity(CHUNK).root == mine.root, "the same model has the same name"
    others = [engine.identity(CHUNK, "tenant"), engine.identity(CHUNK, recipe="lossy"), engine.identity(2 * CHUNK)]
    assert len({mine.root, *(other.root for other in others)}) == 4
    assert mine.root != ToyEngine(seed=1).identity(CHUNK).root


def test_nothing_changes_while_nobody_changes_anything(engine: Engine[Any, Any]) -> None:
    before = engine.state()
    computed(engine)
    assert engine.state() == before
    assert not before.unnamed


@pytest.mark.parametrize("prompt", [[], [-1], [10**6], [1.5], [[1, 2]]])
def test_what_is_no_prompt_is_refused(engine: Engine[Any, Any], prompt: Any) -> None:
    with pytest.raises(BadInput):
        engine.check_prompt(prompt)


def test_a_prompt_or_a_cache_beyond_the_context_is_refused(engine: Engine[Any, Any]) -> None:
    engine.check_prompt([3] * engine.max_context)
    with pytest.raises(BadInput, match=f"context is {engine.max_context}"):
        engine.check_prompt([3] * (engine.max_context + 1))
    for capacity in (0, engine.max_context + 1):
        with pytest.raises(BadInput, match="context"):
            engine.new_cache(capacity)


def test_a_staging_buffer_can_be_written_to(engine: Engine[Any, Any]) -> None:
    for size in (1, 4096, 100_000):
        buffer = engine.staging(size)
        assert len(buffer) >= size
        buffer[:size] = bytes([7]) * size


def test_sampling(engine: Engine[Any, Any]) -> None:
    cache = engine.new_cache(len(PROMPT))
    logits = engine.compute(cache, PROMPT, 0)
    likeliest = int(numbers(logits).argmax())
    assert engine.sampler(0.0, None, None, None)(logits) == likeliest
    assert engine.sampler(5.0, 1, None, 3)(logits) == likeliest
    assert engine.sampler(5.0, None, 1e-6, 3)(logits) == likeliest

    def drawn(seed: int) -> list[int]:
        choose = engine.sampler(5.0, None, None, seed)
        return [choose(logits) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    for temperature, top_k, top_p in ((-1.0, None, None), (float("inf"), None, None), (1.0, 0, None), (1.0, None, 0.0)):
        with pytest.raises(BadInput):
            engine.sampler(temperature, top_k, top_p, None)


@cache
def expected(name: str) -> list[int]:
    with Cake(ENGINES[name](), chunk_tokens=CHUNK) as cake:
        return cake.generate(PROMPT, max_new_tokens=8).token_ids


@pytest.mark.parametrize("mode", ["auto", "load", "both", "compute"])
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_cake_saves_plans_and_restores_with_it(name: str, engine: Engine[Any, Any], mode: Any, codec: str) -> None:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec=codec) as cake:
        assert cake.generate(PROMPT, max_new_tokens=8).token_ids == expected(name)
        assert cake.wait_saved().saved_chunks == CHUNKS + 1, "the answer's, too"
    with Cake(ENGINES[name](), store=store, chunk_tokens=CHUNK, codec=codec, max_span_tokens=CHUNK) as cake:
        assert sum(run.tokens for run in cake.plan(PROMPT, mode=mode)) == len(PROMPT)
        answer = cake.generate(PROMPT, max_new_tokens=8, mode=mode)
    report = answer.report
    assert report.computed_tokens + report.loaded_tokens == len(PROMPT)
    if mode == "load":
        assert report.loaded_tokens == PREFIX
    if mode == "compute":
        assert report.loaded_tokens == 0
    if mode == "both":
        assert report.loaded_tokens
    if codec == "raw":
        assert answer.token_ids == expected(name)
    assert report.exact == (codec == "raw" or not report.loaded_tokens)


def test_a_chunk_that_is_gone_is_computed(name: str, engine: Engine[Any, Any]) -> None:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(PROMPT)
        cake.wait_saved()
        store.delete([chunk_keys(cake.identity, PROMPT)[2]])
        answer = cake.generate(PROMPT, max_new_tokens=8, mode="load")
    assert answer.report.loaded_tokens == PREFIX - CHUNK
    assert answer.token_ids == expected(name)


def test_another_engine_needs_no_torch() -> None:
    code = f"""
import json, sys
from cakekv import Cake
from cakekv.store.memory import MemoryStore
from tests.engine.toy import ToyEngine

store, prompt = MemoryStore(), {PROMPT}
with Cake(ToyEngine(), store=store, chunk_tokens={CHUNK}) as cake:
    first = cake.generate(prompt, max_new_tokens=8)
    cake.wait_saved()
    again = cake.generate(prompt, max_new_tokens=8, mode="load")
print(json.dumps([first.token_ids == again.token_ids, again.report.loaded_tokens, "torch" in sys.modules]))
"""
    folder = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [True, PREFIX, False]
