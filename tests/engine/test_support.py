"""What cannot be restored from chunks is refused, with the reason; what only looks so is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from cakekv import Cake
from cakekv.engine.support import check_config
from cakekv.engine.transformers import TransformersEngine, context_length
from cakekv.errors import BadInput, UnsupportedModel
from tests.matrix.models import CONFIGS, CONTEXT, WINDOW, build, tiny

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mamba", "running state"),
        ("Mamba2", "running state"),
        ("Jamba", "running state"),
        ("Bamba", "running state"),
        ("Zamba2", "running state"),
        ("FalconH1", "running state"),
        ("Qwen3Next", "running state"),
        ("T5", "encoder-decoder"),
        ("Whisper", "encoder-decoder"),
        ("DeepseekV32", "sparse-attention index"),
        ("DeepseekV4", "DeepseekV4"),
    ],
)
def test_a_configuration_is_enough_to_refuse(name: str, reason: str) -> None:
    if name == "DeepseekV4":  # registers its cache layers when its code is loaded
        assert transformers.DeepseekV4ForCausalLM
    with pytest.raises(UnsupportedModel, match=rf"is not supported, because .*{reason}"):
        check_config(getattr(transformers, f"{name}Config")())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL)), "running state"),
        (
            lambda: transformers.RwkvForCausalLM(
                transformers.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)
            ),
            "running state",
        ),
        (
            lambda: transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**SMALL, lru_width=16)),
            "running state",  # until 5.22 its configuration does not say so
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=16, num_layers=1)),
            "encoder-decoder",
        ),
        (lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)), "not causal"),
        (
            lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2)),
            "takes no KV cache",
        ),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL)), "no language-model head"),
        (
            lambda: transformers.Gemma3ForCausalLM(
                transformers.Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True)
            ),
            "not causal",
        ),
    ],
    ids=["mamba", "rwkv", "recurrent-gemma", "t5", "bert", "openai-gpt", "headless", "bidirectional"],
)
def test_a_model_is_refused_before_it_is_used(model: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        TransformersEngine(model())


def test_a_window_that_the_model_does_not_know_is_ignored() -> None:
    """transformers' own cache would drop what lies outside; the model's attention mask would not."""
    config = CONFIGS["llama"]()
    config.sliding_window = WINDOW
    engine = TransformersEngine(tiny(config))
    assert engine.layout.window is None
    tokens = torch.randint(3, 100, (40,)).tolist()
    whole = engine.compute(engine.new_cache(40), tokens, 0)
    cache = engine.new_cache(40)
    engine.compute(cache, tokens[:30], 0)
    torch.testing.assert_close(engine.compute(cache, tokens[30:], 30), whole)


def test_layouts() -> None:
    layers = TransformersEngine(build("gemma3")).layout.layers
    assert [layer.window for layer in layers] == [WINDOW, WINDOW, None]
    keys, values = TransformersEngine(build("deepseek-v3", torch.bfloat16)).layout.layers[0].planes
    assert (keys.heads, keys.width, values.width, keys.itemsize) == (1, 16, 4, 2)
    assert len(TransformersEngine(build("gemma3n")).layout.layers) == 3, "two of five layers read the others' cache"


def test_longrope_is_used_within_its_original_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = CONFIGS["phi3"]()
    assert context_length(config) == CONTEXT
    config = transformers.Phi3Config(
        **{**config.to_dict(), "rope_parameters": rope, "original_max_position_embeddings": CONTEXT // 2}
    )
    assert context_length(config) == CONTEXT // 2


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}


@pytest.mark.parametrize(
    ("name", "stated", "rope", "context"),
    [
        ("llama", CONTEXT, None, CONTEXT),
        ("llama", CONTEXT, {"rope_type": "default"}, CONTEXT),
        ("qwen2", CONTEXT, YARN, 4 * CONTEXT),
        ("qwen2", CONTEXT, {"type": "yarn", "factor": 4.0}, 4 * CONTEXT),
        ("qwen3", CONTEXT + 64, YARN, 4 * CONTEXT),
        ("deepseek-v3", 4 * CONTEXT, YARN, 4 * CONTEXT),
        ("deepseek-v3", 5 * CONTEXT, YARN, 5 * CONTEXT),
        ("llama", CONTEXT, {"rope_type": "linear", "factor": 4.0}, 4 * CONTEXT),
        ("gemma3", CONTEXT, {"rope_type": "linear", "factor": 8.0}, CONTEXT),
        ("llama", 2 * CONTEXT, LLAMA3, 2 * CONTEXT),
        ("llama", CONTEXT, LLAMA3, 8 * CONTEXT),
        ("llama", CONTEXT, {"rope_type": "dynamic", "factor": 4.0}, CONTEXT),
    ],
)
def test_the_context_goes_as_far_as_the_scaling_of_rope(
    name: str, stated: int, rope: dict[str, Any] | None, context: int
) -> None:
    config = CONFIGS[name]()
    changed = {"max_position_embeddings": stated, "rope_scaling": rope}
    given = {key: value for key, value in config.to_dict().items() if not key.startswith("rope")}
    assert context_length(type(config)(**given | changed)) == context


@pytest.mark.parametrize(
    "rope", [YARN, {"rope_type": "linear", "factor": 4.0}, LLAMA3], ids=lambda rope: rope["rope_type"]
)
def test_a_prompt_in_the_scaled_context_is_restored(rope: dict[str, Any]) -> None:
    given = {key: value for key, value in CONFIGS["llama"]().to_dict().items() if not key.startswith("rope")}
    model = tiny(transformers.LlamaConfig(**given, rope_scaling=rope))
    tokens = torch.randint(3, 100, (3 * CONTEXT + 5,)).tolist()
    with Cake(TransformersEngine(model), None, "memory://", chunk_tokens=16) as cake:
        cake.prefill(tokens[: 2 * CONTEXT])
        cake.wait_saved()
        restored = cake.prefill(tokens, mode="load")
        assert restored.report.loaded_tokens == 2 * CONTEXT
        with torch.inference_mode():
            whole = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(restored.logits, whole, atol=2e-4, rtol=2e-4)
        with pytest.raises(BadInput, match=f"the model's context is {cake.engine.max_context} tokens"):
            cake.prefill([3] * (cake.engine.max_context + 1))


def test_dynamic_scaling_is_used_within_its_original_context() -> None:
    """Beyond, it would turn the keys of all positions by the length of the prompt."""
    given = {key: value for key, value in CONFIGS["llama"]().to_dict().items() if not key.startswith("rope")}
    model = tiny(transformers.LlamaConfig(**given, rope_scaling={"rope_type": "dynamic", "factor": 4.0}))
    tokens = torch.randint(3, 100, (CONTEXT,)).tolist()
    with Cake(TransformersEngine(model), None, "memory://", chunk_tokens=16) as cake:
        cake.prefill(tokens[:64])
        cake.wait_saved()
        restored = cake.prefill(tokens, mode="load")
        assert restored.report.loaded_tokens == 64
        with torch.inference_mode():
            whole = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(restored.logits, whole, atol=2e-4, rtol=2e-4)
        with pytest.raises(BadInput, match=f"the model's context is {CONTEXT} tokens"):
            cake.prefill([*tokens, 3])
