"""How models of many families turn their keys is found out, or said not to be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from cakekv.cake import Cake
from cakekv.engine.support import cached_keys
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, UnknownRotation
from tests.matrix.models import CONFIGS, build, tiny

UNKNOWN = {
    **dict.fromkeys(("gpt2", "gpt-bigcode", "gpt-neo", "opt"), "positions are learned and added to the tokens"),
    **dict.fromkeys(("gptj", "codegen"), "sines are in a table, not frequencies"),
    "gpt-oss": "attention sinks: one token again and again has not the same keys",
}
UNTURNED = {"bloom": 3, "mpt": 3, "falcon-alibi": 3, "cohere2": 1, "exaone4": 1, "llama4": 1, "smollm3": 0}
"""Layers whose keys do not depend on their positions."""
INTERLEAVED = {"cohere", "cohere2", "ernie4.5", "glm4", "helium", "llama4"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    engine = TransformersEngine(build(name))
    if name in UNKNOWN:
        with pytest.raises(UnknownRotation, match="explains the keys of its layer"):
            engine.rotations()
        return
    rotations = engine.rotations()
    assert len(rotations) == len(engine.layout.layers)
    if name.startswith("deepseek"):  # what takes the place of keys is latent
        return
    assert sum(not one.frequencies for one in rotations) == UNTURNED.get(name, 0)
    assert {one.interleaved for one in rotations if one.frequencies} <= {name in INTERLEAVED}


def test_layers_may_differ() -> None:
    local, other, full = TransformersEngine(build("gemma3")).rotations()
    assert local == other
    assert local.frequencies[-1] > full.frequencies[-1]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_are_scaled_once_and_for_all(rope: dict[str, Any]) -> None:
    plain, scaled = (TransformersEngine(llama(one)).rotations() for one in ({"rope_type": "default"}, rope))
    assert plain[0].frequencies[-1] > scaled[0].frequencies[-1]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_what_changes_with_the_prompt_is_refused(rope: dict[str, Any]) -> None:
    model = llama(rope)
    with pytest.raises(BadInput, match=rf"type {rope['rope_type']}.*Take nuq3:rope=after"):
        Cake(TransformersEngine(model), codec="nuq3", chunk_tokens=16)
    with Cake(TransformersEngine(model), codec="nuq3:rope=after", chunk_tokens=16):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(dtype: torch.dtype) -> None:
    exact, rounded = (TransformersEngine(build("llama", one)).rotations() for one in (torch.float32, dtype))
    assert [one.interleaved for one in rounded] == [one.interleaved for one in exact]
    assert rounded[0].frequencies == pytest.approx(exact[0].frequencies, rel=0.01)


def test_frequencies_that_are_not_the_models_do_not_pass() -> None:
    engine = TransformersEngine(build("llama"))
    engine.model.model.rotary_emb.register_buffer("inv_freq", torch.tensor([1.0, 0.5, 0.25, 0.1]))
    forward = engine.model.model.rotary_emb.forward
    assert engine.rotations()[0].frequencies == pytest.approx([1.0, 0.5, 0.25, 0.1])
    shifted = torch.tensor([0.9, 0.4, 0.2, 0.05])

    def turned_otherwise(states: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
        angles = position_ids[..., None].float() * torch.cat([shifted, shifted])
        return angles.cos(), angles.sin()

    engine.model.model.rotary_emb.forward = turned_otherwise
    with pytest.raises(UnknownRotation, match="layer 0"):
        engine.rotations()
    engine.model.model.rotary_emb.forward = forward
    assert cached_keys(engine.model, [1, 2])[0].shape == (2, 2, 8)


def llama(rope: dict[str, Any]) -> Any:
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return tiny(transformers.LlamaConfig(**common, **heads, rope_parameters={"rope_theta": 10000.0, **rope}))
