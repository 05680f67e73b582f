"""Single positions computed again in a cache that has all: which ones, what they see, and what is left alone."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch

from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, UnsupportedModel
from cakekv.reuse.blend import Blend
from tests.matrix.models import CONFIGS, build

REFUSED = {"gpt2", "gptj", "gpt-bigcode", "gpt-neo", "codegen", "gemma3n"}
"""By one transformers or another."""
TOKENS, START, ALWAYS = 40, 6, 35
SOME = Blend(recompute=0.3, choice="random")


def prompt_of(engine: TransformersEngine) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, engine.vocabulary_size, (TOKENS,), generator=generator).tolist()


def computed(engine: TransformersEngine) -> tuple[TwoEndedCache, torch.Tensor]:
    cache = engine.new_cache(TOKENS)
    return cache, engine.compute(cache, prompt_of(engine), 0)


def regions(cache: TwoEndedCache) -> list[torch.Tensor]:
    return [region for layer in cache.stored for region in layer.regions]


def disturb(cache: TwoEndedCache, size: float = 0.5, end: int = ALWAYS) -> None:
    """As if what is reused were something else; not in the first layer, whose values depend on nothing else."""
    generator = torch.Generator().manual_seed(5)
    for region in regions(cache)[1:]:
        part = region[:, START:end]
        part += size * torch.randn(part.shape, generator=generator).to(part.dtype)


def blend(engine: TransformersEngine, cache: TwoEndedCache, way: Blend = SOME, gate: Any = None) -> Any:
    return engine.blend(cache, prompt_of(engine)[START:], START, ALWAYS, way, gate)


def check_close(cache: TwoEndedCache, other: TwoEndedCache, tolerance: float = 1e-4) -> None:
    for one, two in zip(regions(cache), regions(other), strict=True):
        assert float((one.double() - two.double()).norm()) <= tolerance * float(two.double().norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    """With all positions computed again, nothing is left of what was there; with some, a right cache stays right."""
    engine = TransformersEngine(build(name))
    try:
        engine.blendable(SOME)
    except UnsupportedModel as error:
        assert name in REFUSED, error  # noqa: PT017
        assert re.search(r"its layers cannot|no mask with a row|does not go through", str(error))  # noqa: PT017
        return
    right, expected = computed(engine)
    cache, _ = computed(engine)
    logits, positions = blend(engine, cache)
    assert torch.allclose(logits, expected, atol=2e-4 * float(expected.abs().max()))
    assert len(positions) == round(0.3 * (ALWAYS - START)) + TOKENS - ALWAYS
    check_close(cache, right)
    disturb(cache, end=TOKENS)
    logits, positions = blend(engine, cache, Blend(recompute=1.0))
    assert torch.allclose(logits, expected, atol=2e-4 * float(expected.abs().max()))
    assert positions == list(range(START, TOKENS))
    check_close(cache, right)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "phi3-window", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_and_precision(name: str, attention: str, dtype: torch.dtype) -> None:
    engine = TransformersEngine(build(name, dtype, attention))
    engine.blendable(SOME)
    right, _ = computed(engine)
    cache, _ = computed(engine)
    disturb(cache)
    assert len(blend(engine, cache, Blend(recompute=1.0))[1]) == TOKENS - START
    check_close(cache, right, 8 * torch.finfo(dtype).eps)


def test_autocast() -> None:
    engine = TransformersEngine(build("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        engine.blendable(SOME)
        cache, expected = computed(engine)
        logits, _ = blend(engine, cache)
    assert float((logits - expected).norm()) < 0.1 * float(expected.norm())


def test_chosen_rows_see_the_mixed_cache_before_them() -> None:
    """By hand: a Llama's third layer, and those above, at the chosen rows alone."""
    model = build("llama")
    engine = TransformersEngine(model)
    cache, _ = computed(engine)
    disturb(cache)
    by_hand = [region.clone() for region in regions(cache)]
    logits, positions = blend(engine, cache)
    rows = torch.tensor(positions)
    assert positions != sorted(range(TOKENS - len(positions), TOKENS)), "they are scattered"
    config, inner = model.config, model.model
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    with torch.inference_mode():
        hidden = inner.embed_tokens(torch.tensor([prompt_of(engine)]))[:, START:]
        at = torch.arange(START, TOKENS)
        for number, layer in enumerate(inner.layers):
            if number == 2:
                hidden, at = hidden[:, rows - START], rows
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            cosine, sine = inner.rotary_emb(normed, at[None])

            def turned(states: torch.Tensor, cosine: torch.Tensor = cosine, sine: torch.Tensor = sine) -> torch.Tensor:
                one, other = states.chunk(2, -1)
                return states * cosine + torch.cat([-other, one], -1) * sine

            split = (len(at), -1, attention.head_dim)
            queries = turned(attention.q_proj(normed)[0].view(split).transpose(0, 1))
            by_hand[number][:heads, at] = turned(attention.k_proj(normed)[0].view(split).transpose(0, 1))
            by_hand[number][heads:, at] = attention.v_proj(normed)[0].view(split).transpose(0, 1)
            keys, values = (part.repeat_interleave(groups, 0) for part in by_hand[number].split(heads))
            scores = queries @ keys.transpose(-1, -2) / math.sqrt(attention.head_dim)
            scores = scores.masked_fill(torch.arange(TOKENS) > at[:, None], -math.inf).softmax(-1)
            hidden = hidden + attention.o_proj((scores @ values).transpose(0, 1).reshape(1, len(at), -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        expected = model.lm_head(inner.norm(hidden))[0, -1]
    assert torch.allclose(logits, expected, atol=1e-3)
    for region, wanted in zip(regions(cache), by_hand, strict=True):
        assert torch.allclose(region, wanted, atol=1e-3)


def test_what_deviates_most_is_chosen() -> None:
    engine = TransformersEngine(build("llama"))
    wrong = {"keys": [8, 20], "values": [11, 30]}
    chosen = {}
    for tensor in ("keys", "values", "both"):
        cache, _ = computed(engine)
        half = cache.stored[1].key_heads
        region = cache.stored[1].regions[0]
        region[:half, wrong["keys"]] += 1.0
        region[half:, wrong["values"]] += 2.0
        budget = 4 if tensor == "both" else 2
        _, positions = blend(engine, cache, Blend(recompute=budget / (ALWAYS - START), tensor=tensor))
        chosen[tensor] = positions[: -(TOKENS - ALWAYS)]
        assert positions[budget:] == list(range(ALWAYS, TOKENS)), "what follows is always computed"
    assert chosen == {**wrong, "both": [8, 11, 20, 30]}


def test_the_choice_is_the_same_for_the_same_prompt_and_random_ones_are_others() -> None:
    engine = TransformersEngine(build("llama"))
    found = []
    for way in (Blend(recompute=0.3), SOME, Blend(recompute=0.3), SOME):
        cache, _ = computed(engine)
        disturb(cache)
        logits, positions = blend(engine, cache, way)
        found.append((logits.tolist(), positions))
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0][1] != found[1][1]


def test_layers_wait_at_the_gate_and_what_fails_there_is_undone() -> None:
    engine = TransformersEngine(build("gemma3"))
    cache, _ = computed(engine)
    disturb(cache)
    before = [region.clone() for region in regions(cache)]
    asked: list[int] = []

    def fail(layer: int) -> None:
        asked.append(layer)
        if layer == 2:
            raise LookupError

    with pytest.raises(LookupError):
        blend(engine, cache, gate=fail)
    assert sorted(set(asked)) == [0, 1, 2]
    assert all(map(torch.equal, regions(cache), before))
    logits, _ = blend(engine, cache, gate=lambda layer: None)
    other, _ = computed(engine)
    disturb(other)
    assert torch.equal(logits, blend(engine, other)[0])


def test_the_model_is_not_touched_and_others_compute_with_it_meanwhile() -> None:
    engine = TransformersEngine(build("gemma3"))
    _, expected = computed(engine)
    others: list[torch.Tensor] = []
    modules, state = list(engine.model.modules()), engine.state()
    cache, _ = computed(engine)
    logits, _ = blend(engine, cache, gate=lambda layer: others.append(computed(engine)[1]))
    assert torch.allclose(logits, expected, atol=1e-3)
    assert others
    assert all(torch.equal(other, expected) for other in others)
    assert list(engine.model.modules()) == modules
    assert engine.state() == state


def test_hooks_run_and_a_compiled_model_is_driven_as_it_is() -> None:
    model = build("llama")
    seen = []
    model.model.layers[2].mlp.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    engine = TransformersEngine(model)
    cache, expected = computed(engine)
    model.compile(backend="eager")
    logits, positions = blend(engine, cache)
    assert seen[-1] == len(positions)
    assert torch.allclose(logits, expected, atol=1e-3)


def test_what_cannot_be_driven_is_refused() -> None:
    engine = TransformersEngine(build("llama"))
    with pytest.raises(UnsupportedModel, match="no layer 3"):
        engine.blendable(Blend(check=3))
    engine.blendable(Blend(check=2))
    with pytest.raises(BadInput, match="cannot be blended"):
        engine.blend(engine.new_cache(4), [1, 2, 3], 2, 3, SOME)
    model = build("llama")
    engine = TransformersEngine(model)
    model.model.forward = partial(type(model.model).forward, model.model)  # as libraries that offload weights do
    with pytest.raises(UnsupportedModel, match="does not go through the list of its layers"):
        engine.blendable(SOME)
