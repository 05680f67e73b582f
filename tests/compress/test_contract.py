"""What every method must do, on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cakekv.compress import METHODS, method_named
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from tests.matrix.models import build

PROMPT = 90
SMALL = {
    "dbudgetkv": "dbudgetkv:threshold=0.2,min_recent=0,exempt=0",
    "corm": "corm:window=4,recent=4",
    "kvmerger": "kvmerger:share=0.5,first_layers=0,last_layers=0",
    "cascading": "cascading:size=32,sinks=4",
    "key_norm": "key_norm:when=prefill",
}
"""Methods that would keep everything of so short a prompt, with parameters that do not."""
EVERYTHING = {
    "sink_recent": "sink_recent:share=1",
    "heavy_hitter": "heavy_hitter:share=1",
    "dbudgetkv": "dbudgetkv:threshold=0",
    "vl_cache": "vl_cache:share=1",
    "elastic_cache": "elastic_cache:share=1",
    "kvmerger": "kvmerger:share=1",
    "key_norm": "key_norm:when=prefill,share=1",
}
"""Parameters of those that can be told to keep everything."""


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama"))


def filled(engine: Any, tokens: int) -> tuple[list[int], Any, torch.Tensor]:
    """A prompt, its complete cache, and its logits."""
    generator = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(3, engine.vocabulary_size, (tokens,), generator=generator).tolist()
    cache = engine.new_cache(tokens + 8)
    return prompt, cache, engine.compute(cache, prompt, 0)


def positions(left: Any) -> Sequence[torch.Tensor]:
    return [layer.positions.clone() for layer in left.stored]


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_says_all_of_it(name: str) -> None:
    method = method_named(SMALL.get(name, name))
    again = method_named(method.recipe)
    assert again == method
    assert again.fingerprint == method.fingerprint
    with pytest.raises(BadInput, match=f"compress {name} has no parameter"):
        method_named(f"{name}:nothing=1")


@pytest.mark.parametrize("name", METHODS)
def test_fewer_tokens_are_kept_the_same_each_time_and_the_cache_stays_as_it_was(
    engine: TransformersEngine, name: str
) -> None:
    prompt, cache, _ = filled(engine, PROMPT)
    method = method_named(SMALL.get(name, name))
    left = engine.compress(cache, prompt, method)
    assert 0 < left.kept_share < 1
    again = engine.compress(cache, prompt, method)
    assert all(torch.equal(one, other) for one, other in zip(positions(left), positions(again), strict=True))
    engine.compute(left, [5, 6], PROMPT)
    _, fresh, _ = filled(engine, PROMPT)
    for number in (0, 1):
        for one, other in zip(cache.stored, fresh.stored, strict=True):
            assert torch.equal(one.plane(number)[:, :, :PROMPT], other.plane(number)[:, :, :PROMPT])


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_keeps_everything_gives_back_the_very_cache(engine: TransformersEngine, name: str) -> None:
    prompt, cache, _ = filled(engine, PROMPT)
    assert engine.compress(cache, prompt, method_named(EVERYTHING[name])) is cache


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_short_prompts(engine: TransformersEngine, name: str, tokens: int) -> None:
    prompt, cache, _ = filled(engine, tokens)
    left = engine.compress(cache, prompt, method_named(SMALL.get(name, name)))
    assert bool(engine.compute(left, [5], tokens).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_an_answer_goes_on(name: str, dtype: torch.dtype) -> None:
    engine = TransformersEngine(build("llama", dtype))
    prompt, cache, logits = filled(engine, 40)
    left = engine.compress(cache, prompt, method_named(SMALL.get(name, name)))
    for position in range(40, 80):
        logits = engine.compute(left, [int(logits.argmax())], position)
        assert bool(logits.isfinite().all())
    assert left.length == 80
    engine.compute(left, [5, 6, 7], 80)
    for layer in left.stored:
        assert bool((layer.positions[:, -1] == 82).all())
