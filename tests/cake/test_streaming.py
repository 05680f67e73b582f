"""Prompts and answers that are longer than the model's context: taken in strides."""

from __future__ import annotations

import pytest
import torch

from cakekv.cake import Cake
from cakekv.compress import method_named
from cakekv.embedded.streaming import take
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, PromptTooLong
from cakekv.results import Progress
from cakekv.store.memory import MemoryStore
from tests.matrix.models import CONTEXT, VOCABULARY, build

RECIPE = "cascading:size=64,sinks=8,stride_tokens=96"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama"))


def prompt_of(tokens: int, seed: int = 3) -> list[int]:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def cake_of(engine: TransformersEngine, compress: str | None = RECIPE, store: MemoryStore | None = None) -> Cake:
    return Cake(engine, None, store, chunk_tokens=16, compress=compress)


def answer_of(engine: TransformersEngine, prompt: list[int], tokens: int) -> list[int]:
    """By hand."""
    method, cache = method_named(RECIPE), None
    for start in range(0, len(prompt), 96):
        cache, logits = take(engine, method, cache, prompt[start : start + 96], start)
    answer: list[int] = []
    for step in range(tokens):
        answer.append(int(logits.argmax()))
        logits = engine.compute(cache, answer[-1:], len(prompt) + step)
    return answer


def test_a_prompt_longer_than_the_context(engine: TransformersEngine) -> None:
    """In strides, of which the report tells; nothing is saved of it, and the memory is that of the method."""
    prompt, progress = prompt_of(700), list[Progress]()
    with MemoryStore() as store, cake_of(engine, store=store) as cake:
        answer = cake.generate(prompt, max_new_tokens=30, on_progress=progress.append)
        assert cake.wait_saved().saved_chunks == 0
        planned = cake.plan(prompt)
    assert answer.token_ids == answer_of(engine, prompt, len(answer.token_ids))
    report = answer.report
    assert [(span.start, span.tokens) for span in report.spans] == [(at, min(96, 700 - at)) for at in range(0, 700, 96)]
    assert (report.prompt_tokens, report.computed_tokens, report.prefix_tokens) == (700, 700, 0)
    assert report.compress.startswith("cascading:size=64")
    assert report.kept_share == pytest.approx(64 / 700)
    assert report.cache_bytes == 64 * engine.held_bytes(engine.new_cache(1))
    assert any("in strides of 96 tokens" in note and "Nothing was loaded or saved" in note for note in report.notes)
    assert [one.front for one in progress] == [span.start + span.tokens for span in report.spans]
    assert [(run.start, run.tokens, run.how) for run in planned] == [(0, 700, "compute")]


def test_an_answer_goes_on_beyond_the_context(engine: TransformersEngine) -> None:
    """Also behind a prompt that fits, which is restored as ever; without such a method it ends there."""
    prompt = prompt_of(CONTEXT - 10)
    with MemoryStore() as store:
        with cake_of(engine, None, store) as plain:
            ends = plain.generate(prompt, max_new_tokens=40)
            plain.wait_saved()
        with cake_of(engine, store=store) as cake:
            goes_on = cake.generate(prompt, max_new_tokens=40, mode="load")
    assert goes_on.report.loaded_tokens > 0
    assert goes_on.finish_reason == "stop" or len(goes_on.token_ids) == 40
    assert len(ends.token_ids) <= 11


def test_a_prompt_as_long_as_the_context(engine: TransformersEngine) -> None:
    with cake_of(engine) as cake:
        fits = cake.generate(prompt_of(CONTEXT), max_new_tokens=5)
        not_quite = cake.generate(prompt_of(CONTEXT + 1), max_new_tokens=5)
    assert not any("strides" in note for note in fits.report.notes)
    assert any("strides" in note for note in not_quite.report.notes)


def test_prompts_may_always_be_taken_in_strides(engine: TransformersEngine) -> None:
    """Though they fit, and though they are stored."""
    prompt = prompt_of(200)
    with MemoryStore() as store:
        with cake_of(engine, None, store) as plain:
            plain.prefill(prompt)
            plain.wait_saved()
        with cake_of(engine, f"{RECIPE},prefill=stride", store) as cake:
            answer = cake.generate(prompt, max_new_tokens=8)
    assert answer.token_ids == answer_of(engine, prompt, len(answer.token_ids))
    assert answer.report.loaded_tokens == 0
    assert len(answer.report.spans) == 3


def test_strides_leave_room(engine: TransformersEngine) -> None:
    """A stride and what is left before it fit into the context together."""
    with cake_of(engine, "cascading:size=200") as cake:
        report = cake.prefill(prompt_of(400)).report
    assert {span.tokens for span in report.spans} == {CONTEXT - 200, 400 % (CONTEXT - 200)}


@pytest.mark.parametrize(
    ("compress", "says"),
    [
        (None, "the prompt has 300 tokens, but the model's context is 256 tokens: shorten it$"),
        ("sink_recent:recent=32", "context is 256 tokens: shorten it$"),
        ("cascading", "shorten it, or have compress cascading keep fewer than its 512 tokens"),
    ],
)
def test_still_too_long(engine: TransformersEngine, compress: str | None, says: str) -> None:
    with cake_of(engine, compress) as cake, pytest.raises(PromptTooLong, match=says):
        cake.prefill(prompt_of(300))


def test_other_mistakes_are_found(engine: TransformersEngine) -> None:
    with cake_of(engine) as cake, pytest.raises(BadInput, match=r"token id 128 at position 299 is out of range"):
        cake.prefill([*prompt_of(299), VOCABULARY])


@pytest.mark.parametrize("name", ["qwen2-mixed", "mistral", "phi"])
def test_other_families(name: str) -> None:
    """Layers with a window keep that; keys may be turned in part."""
    engine = TransformersEngine(build(name))
    with cake_of(engine) as cake:
        prefill = cake.prefill(prompt_of(600))
    assert prefill.logits.isfinite().all()
    assert max(layer.used for layer in prefill.cache.stored) <= 64
    assert prefill.report.cache_bytes <= 64 * engine.held_bytes(engine.new_cache(1))
