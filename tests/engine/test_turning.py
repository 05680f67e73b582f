"""Keys that are placed elsewhere than where they were computed are those that the model computes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cakekv.engine.base import Move
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.engine.turning import _plain, _turned_by_host, turned
from cakekv.errors import BadInput, UnknownRotation
from cakekv.rotation import Rotation
from tests.matrix.models import CONFIGS, build, tiny
from tests.matrix.restoring import gather

REFUSED = {"gpt2", "gptj", "gpt-bigcode", "gpt-neo", "gpt-oss", "opt", "codegen", "deepseek-v2", "deepseek-v3"}
WITHOUT_POSITIONS = {"bloom", "mpt"}
TOKENS, SKIP = 20, 3


def alone(engine: TransformersEngine, first: int) -> TwoEndedCache:
    """A document's cache, computed by itself from position `first` on."""
    tokens = torch.randint(3, engine.vocabulary_size, (TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = engine.new_cache(TOKENS)
    cache.set_length(0)
    with torch.inference_mode():
        engine.forward(cache, tokens, position_ids=torch.arange(first, first + TOKENS)[None])
    return cache


def away(engine: TransformersEngine, by: int, move: Move) -> float:
    """How far a moved document is from one that was computed where it is moved to, as a share of its size."""
    here, there = alone(engine, 0), alone(engine, by)
    moved = engine.new_cache(by + TOKENS)
    engine.place_moved(moved, by + move.skip, TOKENS - move.skip, gather(engine, here, 0, TOKENS), move)
    most = 0.0
    for one, other in zip(moved.stored, there.stored, strict=True):
        for region, expected in zip(one.regions, other.regions, strict=True):
            wanted = expected[:, move.skip :].double()
            most = max(most, float((region[:, by + move.skip :].double() - wanted).norm() / wanted.norm()))
    return most


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    engine = TransformersEngine(build(name))
    if name in REFUSED:
        with pytest.raises(UnknownRotation, match="keys of its layer"):
            engine.turnable()
        return
    rotations = engine.turnable()
    if name not in WITHOUT_POSITIONS:
        for by in (1, 200):
            assert away(engine, by, Move(TOKENS, SKIP, by, rotations)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "cohere"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    engine = TransformersEngine(build(name, dtype))
    assert away(engine, 100, Move(TOKENS, 0, 100, engine.turnable())) < 8 * torch.finfo(dtype).eps


def test_unturned_keys_are_others() -> None:
    engine = TransformersEngine(build("llama"))
    assert away(engine, 100, Move(TOKENS, 0, 100, None)) > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_device_turns_as_the_host_does(dtype: torch.dtype, interleaved: bool) -> None:
    keys = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = keys.clone()
    rotation = Rotation((1.0, 0.1, 0.01), interleaved)
    one, other = turned(keys[:, 1:], rotation.turns(77, 1), interleaved), _turned_by_host(keys[:, 1:], rotation, 77)
    assert torch.equal(keys, before), "what was read stays as it is"
    assert torch.allclose(one, torch.from_numpy(other).view(dtype), atol=float(torch.finfo(dtype).eps))
    assert torch.equal(one[..., 6:], keys[:, 1:, 6:])
    assert not torch.equal(one[..., :6], keys[:, 1:, :6])
    assert _plain(one).shape == (2, 4, 12)


def test_what_does_not_fit_is_refused() -> None:
    engine = TransformersEngine(build("llama"))
    segments, cache = gather(engine, alone(engine, 0), 0, TOKENS), engine.new_cache(TOKENS)
    for start, tokens, move in (
        (0, TOKENS, Move(TOKENS, 1, 5, None)),
        (1, TOKENS, Move(TOKENS, 0, 1, None)),
        (0, TOKENS - 1, Move(TOKENS - 1, 0, 5, None)),
    ):
        with pytest.raises(BadInput):
            engine.place_moved(cache, start, tokens, segments, move)


def test_positions_that_change_with_the_prompt_are_refused() -> None:
    config: Any = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnknownRotation, match="changes with the prompt's length"):
        TransformersEngine(tiny(config)).turnable()
