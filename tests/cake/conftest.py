"""A tiny real model and prompts for it."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.engine.transformers import TransformersEngine
from tests.cake.crowd import Watched

CHUNK = 16


@pytest.fixture(scope="session")
def engine() -> TransformersEngine:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return TransformersEngine(LlamaForCausalLM(config).float())


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """20 full chunks and a suffix of 5 tokens."""
    rng = random.Random(3)
    return [rng.randrange(211) for _ in range(20 * CHUNK + 5)]


@pytest.fixture
def watched(engine: TransformersEngine) -> Watched:
    return Watched(engine.model)
