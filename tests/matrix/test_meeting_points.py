"""Wherever compute and loads meet, the result is a full prefill's: every family of models, every meeting point."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import CONFIGS, build
from tests.matrix.restoring import (
    CHUNK,
    NEW_TOKENS,
    PREFIX,
    PROMPT,
    follow,
    load,
    noise,
    poisoned_cache,
    prefill,
    prompt,
)

NOISE_FACTOR = 4
"""A restore may differ from the full prefill by this many times what full prefills differ by among themselves."""

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    *((name, FLOAT32, None) for name in CONFIGS),
    *((name, FLOAT32, "eager") for name in ("llama", "gemma3", "mistral", "gpt2", "deepseek-v3", "llama4")),
    *((name, BFLOAT16, None) for name in ("llama", "gemma3", "gpt-neox", "mixtral", "deepseek-v2", "phi3-window")),
    *((name, FLOAT16, None) for name in ("llama", "gemma3", "falcon", "deepseek-v3")),
]


@dataclass
class Reference:
    """A model with the full prefill of the prompt."""

    engine: TransformersEngine
    prompt: list[int]
    cache: TwoEndedCache
    logits: torch.Tensor
    tolerance: float
    tokens: list[int]
    decided: list[bool]
    """Which of the greedy `tokens` rounding alone could not change."""


@cache
def reference(name: str, dtype: torch.dtype, attention: str | None, device: str) -> Reference:
    torch.manual_seed(0)
    engine = TransformersEngine(build(name, dtype, attention).to(device))
    full, logits = prefill(engine, prompt(), [0])
    tolerance = NOISE_FACTOR * noise(engine, prompt(), logits)
    tokens, margins = follow(engine, full, logits, [None] * NEW_TOKENS)
    decided = [margin > 2 * tolerance for margin in margins]
    return Reference(engine, prompt(), full, logits, tolerance, tokens, decided)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case if part))
def expected(request: pytest.FixtureRequest, device: str) -> Reference:
    return reference(*request.param, device)


def finish(expected: Reference, restored: TwoEndedCache) -> float:
    """Compute the suffix and a greedy continuation; by how much the suffix's logits are off."""
    engine = expected.engine
    logits = engine.compute(restored, expected.prompt[PREFIX:], PREFIX)
    difference = float((logits - expected.logits).abs().max())
    if difference <= expected.tolerance:
        choices, _ = follow(engine, restored, logits, expected.tokens)
        for choice, token, decided in zip(choices, expected.tokens, expected.decided, strict=True):
            assert choice == token or not decided
    return difference


def test_every_meeting_point(expected: Reference) -> None:
    assert all(expected.decided) if expected.engine.model.dtype == FLOAT32 else any(expected.decided)
    for meeting_point in (*range(0, PREFIX + 1, CHUNK), 13, 37, PREFIX - 1):
        restored = poisoned_cache(expected.engine)
        first_loaded = -(-meeting_point // CHUNK) * CHUNK
        for start in reversed(range(first_loaded, PREFIX, CHUNK)):
            load(expected.engine, restored, expected.cache, start, read_at=PREFIX)
        if meeting_point:
            expected.engine.compute(restored, expected.prompt[:meeting_point], 0)
        if first_loaded > meeting_point:
            expected.engine.compute(restored, expected.prompt[meeting_point:first_loaded], meeting_point)
        assert finish(expected, restored) <= expected.tolerance, f"met at {meeting_point}"


def test_the_last_token_over_the_chunk_that_it_completes(expected: Reference) -> None:
    engine, tokens = expected.engine, expected.prompt[:PREFIX]
    _, whole = prefill(engine, tokens, [0])
    restored = poisoned_cache(engine)
    for start in range(0, PREFIX, CHUNK):
        load(engine, restored, expected.cache, start, read_at=PREFIX - 1)
    logits = engine.compute(restored, tokens[-1:], PREFIX - 1)
    assert float((logits - whole).abs().max()) <= NOISE_FACTOR * noise(engine, tokens, whole)
    assert finish(expected, restored) <= expected.tolerance


def test_a_hole_between_loaded_chunks(expected: Reference) -> None:
    for hole, hole_end in ((8, 16), (32, 56), (64, 72)):
        restored = poisoned_cache(expected.engine)
        for start in range(0, hole, CHUNK):
            load(expected.engine, restored, expected.cache, start, read_at=hole)
        for start in range(hole_end, PREFIX, CHUNK):
            load(expected.engine, restored, expected.cache, start, read_at=PREFIX)
        expected.engine.compute(restored, expected.prompt[hole:hole_end], hole)
        assert finish(expected, restored) <= expected.tolerance, f"hole at {hole}"


def test_a_missing_chunk_is_noticed(expected: Reference) -> None:
    """The negative control: the loaded bytes are what makes the difference."""
    for poison in (0.0, float("nan")):
        restored = poisoned_cache(expected.engine)
        for start in range(0, PREFIX, CHUNK):
            load(expected.engine, restored, expected.cache, start, read_at=PREFIX)
        for layer in restored.stored:
            for region in layer.regions:
                region[:, PREFIX - CHUNK : PREFIX] = poison
        assert not finish(expected, restored) <= expected.tolerance


def test_windowed_layers_load_only_what_is_seen(expected: Reference) -> None:
    layout = expected.engine.layout
    unwindowed = sum(layout.layers[index].token_bytes for index in layout.unwindowed)
    assert load(expected.engine, poisoned_cache(expected.engine), expected.cache, 0, PREFIX) == unwindowed * CHUNK
    assert load(expected.engine, poisoned_cache(expected.engine), expected.cache, PREFIX - CHUNK, PREFIX) == (
        layout.token_bytes * CHUNK
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
def test_loading_beside_computing(name: str, device: str) -> None:
    expected = reference(name, FLOAT32, None, device)
    restored = poisoned_cache(expected.engine)
    middle = PREFIX // 2 // CHUNK * CHUNK
    loads = [
        threading.Thread(target=load, args=(expected.engine, restored, expected.cache, start, PREFIX))
        for start in range(middle, PREFIX, CHUNK)
    ]
    for thread in loads:
        thread.start()
    for start in range(0, middle, 3):
        expected.engine.compute(restored, expected.prompt[start : min(start + 3, middle)], start)
    for thread in loads:
        thread.join()
    assert finish(expected, restored) <= expected.tolerance


@pytest.mark.parametrize("name", list(CONFIGS))
def test_agrees_with_the_model_alone(name: str, device: str) -> None:
    """The model's own generate, with its own cache, gives the same tokens."""
    expected = reference(name, FLOAT32, None, device)
    alone = expected.engine.model.generate(
        torch.tensor([expected.prompt], device=device),
        max_new_tokens=len(expected.tokens),
        do_sample=False,
        eos_token_id=None,
    )
    assert alone[0, PROMPT:].tolist() == expected.tokens
