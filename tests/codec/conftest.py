"""A tiny real model, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.codec import basis
from cakekv.engine.transformers import TransformersEngine
from tests.bases import learn_model


@pytest.fixture(scope="session", autouse=True)
def bases_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bases that tests learn stay out of the user's own cache."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(basis, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def make_engine(bases_folder: None) -> Callable[[str], TransformersEngine]:
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
    engine = TransformersEngine(LlamaForCausalLM(config).to(getattr(torch, dtype)))
    learn_model(engine)
    return engine
