"""A model that changes while a Cake lives: never another model's cache, neither loaded nor saved."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BloomConfig

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, UnsupportedModel
from cakekv.store.memory import MemoryStore
from tests.matrix.models import build, tiny

PROMPT = random.Random(4).choices(range(3, 128), k=100)
CHANGED = "The model changed"


def cake_of(model: Any, store: Any = "memory://", **options: Any) -> Cake:
    return Cake(TransformersEngine(model), store=store, chunk_tokens=8, max_span_tokens=16, **options)


def full(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].float()
    return logits


def check_exact(cake: Cake, model: Any, loaded: int) -> None:
    """What the model's prompt gets is what the model computes, and so many tokens of it were loaded."""
    prefill = cake.prefill(PROMPT, mode="load")
    torch.testing.assert_close(prefill.logits, full(model), atol=1e-4, rtol=1e-4)
    assert prefill.report.loaded_tokens == loaded


@pytest.fixture
def model() -> Any:
    return build("llama")


def scale_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)


def scale_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.25)


@pytest.mark.parametrize("change", [scale_weights, scale_frequencies])
def test_a_changed_model_loads_and_saves_its_own(model: Any, change: Callable[[Any], None]) -> None:
    cake = cake_of(model)
    cake.prefill(PROMPT)
    cake.wait_saved()
    check_exact(cake, model, loaded=96)
    before = cake.identity
    change(model)
    assert cake.identity != before
    check_exact(cake, model, loaded=0)
    cake.wait_saved()
    check_exact(cake, model, loaded=96)
    assert cake.last_report is not None
    assert cake.last_report.notes == []
    other = cake_of(build("llama"), cake.tiers)
    check_exact(other, other.engine.model, loaded=96)  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["train", "autocast", "hook"])
def test_what_has_no_name_is_neither_loaded_nor_saved(model: Any, how: str) -> None:
    store = MemoryStore()
    cake = cake_of(model, store)
    cake.prefill(PROMPT[:48])
    saved = cake.wait_saved().saved_chunks
    hook = None
    if how == "train":
        model.train()
    if how == "hook":
        hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    with torch.autocast("cpu", dtype=torch.bfloat16) if how == "autocast" else nullcontext():
        generation = cake.generate(PROMPT, max_new_tokens=3)
    assert cake.wait_saved().saved_chunks == saved
    assert generation.report.loaded_tokens == 0
    assert "Nothing was loaded or saved" in generation.report.notes[0]
    model.eval()
    if hook is not None:
        hook.remove()
    check_exact(cake, model, loaded=48)
    assert cake.wait_saved().saved_chunks > saved


@pytest.mark.parametrize("there_and_back", [False, True])
def test_a_change_within_a_request_ends_saving(model: Any, there_and_back: bool) -> None:
    cake = cake_of(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    original = weight.detach().clone()

    def on_progress(progress: Any) -> None:
        if progress.front >= 48:
            with torch.no_grad():
                weight.mul_(2)
                if there_and_back:
                    weight.copy_(original)

    report = cake.prefill(PROMPT, on_progress=on_progress).report
    assert CHANGED in report.notes[-1]
    assert cake.wait_saved().saved_chunks <= 6
    with torch.no_grad():
        weight.copy_(original)
    check_exact(cake, model, loaded=cake.wait_saved().saved_chunks * 8)


def test_a_change_while_the_answer_is_decoded_is_said(model: Any) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(97 + token % 26) for token in ids)

    cake = cake_of(model)
    cake.tokenizer = Tokenizer()
    cake._tokenizing.__init__(cake.tokenizer)  # type: ignore[misc]
    model.generation_config.eos_token_id = None
    pieces = cake.stream(PROMPT, max_new_tokens=6)
    next(pieces)
    report = cake.last_report
    assert report is not None
    assert report.notes == []
    scale_weights(model)
    list(pieces)
    assert CHANGED in report.notes[-1]


class Held(MemoryStore):
    """A store that takes nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def write(self, *arguments: Any, **more: Any) -> bool:
        self.may.wait()
        return super().write(*arguments, **more)


def compute_again(engine: TransformersEngine, cache: Any) -> None:
    engine.compute(cache, [5] * 40, 20)


def forward_by_hand(engine: TransformersEngine, cache: Any) -> None:
    cache.set_length(20)
    with torch.inference_mode():
        engine.model(input_ids=torch.tensor([[5] * 40]), past_key_values=cache)


def reset(engine: TransformersEngine, cache: Any) -> None:
    cache.reset()
    with torch.no_grad():
        engine.model(input_ids=torch.tensor([[5] * 40]), past_key_values=cache)


def write_directly(engine: TransformersEngine, cache: Any) -> None:
    cache.stored[1].regions[0][:, 30:40] = 0


def go_on(engine: TransformersEngine, cache: Any) -> None:
    engine.compute(cache, [5], 99)


@pytest.mark.parametrize("use", [compute_again, forward_by_hand, reset, write_directly, go_on])
def test_a_cache_that_its_owner_goes_on_with_is_not_saved_wrong(
    model: Any, use: Callable[[TransformersEngine, Any], None]
) -> None:
    store = Held()
    engine = TransformersEngine(model)
    cake = Cake(engine, store=store, chunk_tokens=8, max_span_tokens=16)
    prefill = cake.prefill(PROMPT)
    use(engine, prefill.cache)
    store.may.set()
    report = replace(cake.wait_saved())
    assert report.saved_chunks + report.failed_chunks == 12
    assert report.saved_chunks == 12 if use is go_on else "written to" in (report.error or "")
    prefill = cake.prefill(PROMPT, mode="load")
    assert prefill.report.loaded_tokens == 8 * report.saved_chunks
    torch.testing.assert_close(prefill.logits, full(model), atol=1e-4, rtol=1e-4)


def test_what_was_gathered_before_it_was_written_to_is_saved(model: Any) -> None:
    cake = cake_of(model)
    prefill = cake.prefill(PROMPT)
    assert cake.wait_saved().saved_chunks == 12
    compute_again(cake.engine, prefill.cache)  # type: ignore[arg-type]
    check_exact(cake, model, loaded=96)


def test_a_codec_set_up_for_other_positions_stores_nothing(model: Any) -> None:
    pytest.importorskip("numba")
    cake = cake_of(model, codec="nuq3")
    assert cake.codec.turns_back
    cake.prefill(PROMPT)
    saved = cake.wait_saved().saved_chunks
    assert saved
    scale_frequencies(model)
    report = cake.prefill(PROMPT).report
    assert "set up for the positions" in report.notes[0]
    assert cake.wait_saved().saved_chunks == saved


def test_a_model_that_outgrew_its_engine_is_refused_and_served_again(model: Any) -> None:
    cake = cake_of(model)
    cake.prefill(PROMPT)
    cake.wait_saved()
    model.bfloat16()
    for call in (cake.prefill, cake.generate):
        with pytest.raises(UnsupportedModel, match="make a new engine"):
            call(PROMPT)
    other = cake_of(model, cake.tiers)
    assert other.prefill(PROMPT, mode="load").report.loaded_tokens == 0


@pytest.mark.parametrize("tenant", [None, 5, b"abc"])
def test_a_tenant_is_a_text(model: Any, tenant: Any) -> None:
    with pytest.raises(BadInput, match="tenant"):
        cake_of(model, tenant=tenant)


def test_any_text_is_a_tenant(model: Any) -> None:
    cake = cake_of(model, tenant="ü")
    cake.prefill(PROMPT)
    cake.wait_saved()
    check_exact(cake, model, loaded=96)


def test_endless_contexts_have_an_end() -> None:
    config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    cake = cake_of(tiny(config), None)
    for tokens in (10**11, 10**16, 10**20):
        with pytest.raises(BadInput, match="memory"):
            cake.generate([5, 6, 7], max_new_tokens=tokens)
