"""A tiny real model, in any dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.engine.transformers import TransformersEngine


@pytest.fixture(scope="session")
def make_engine() -> Callable[[str], TransformersEngine]:
    """Takes the name of the dtype."""
    return _engine


def _engine(dtype: str) -> TransformersEngine:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    return TransformersEngine(LlamaForCausalLM(config).to(getattr(torch, dtype)))
