"""Tiny random models of many families: enough structure to go wrong, small enough to run in milliseconds.

`build(name)` is seeded, so every call gives the same model. Windows are shorter than the tests' prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 128
CONTEXT = 256
WINDOW = 17
"""The first position that the suffix of the tests' prompt sees is then the first of a chunk."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_positions": CONTEXT,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention"]


def _family(name: str, common: dict[str, Any] = _COMMON, **changes: Any) -> Callable[[], Any]:
    """What makes the configuration class `name` + "Config"."""
    return lambda: getattr(transformers, f"{name}Config")(**{**common, **changes})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _family("Llama"),
    "qwen2": _family("Qwen2"),
    "qwen2-mixed": _family("Qwen2", use_sliding_window=True, sliding_window=WINDOW, layer_types=_MIXED),
    "qwen3": _family("Qwen3", head_dim=16),
    "qwen3-moe": _family(
        "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "mistral": _family("Mistral", sliding_window=WINDOW),
    "ministral": _family("Ministral", sliding_window=WINDOW, layer_types=_MIXED, head_dim=8),
    "gemma": _family("Gemma", head_dim=8),
    "gemma2": _family("Gemma2", head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": _family("Gemma3Text", head_dim=8, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=8),
    "gemma3n": _family(
        "Gemma3nText",
        head_dim=8,
        num_hidden_layers=5,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 5,
        intermediate_size=[48] * 5,
    ),
    "phi": _family("Phi", partial_rotary_factor=0.5),
    "phi3": _family("Phi3"),
    "phi3-window": _family("Phi3", sliding_window=WINDOW),
    "gpt2": _family("GPT2", _GPT),
    "gptj": _family("GPTJ", _GPT, rotary_dim=4),
    "gpt-bigcode": _family("GPTBigCode", _GPT, multi_query=True),
    "gpt-neo": _family(
        "GPTNeo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": CONTEXT, "window_size": WINDOW},
        bos_token_id=1,
        eos_token_id=2,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt-neox": _family("GPTNeoX", rotary_pct=0.5),
    "gpt-oss": _family(
        "GptOss",
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "opt": _family("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "bloom": _family("Bloom", n_layer=3, n_head=4),
    "mpt": _family(
        "Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT}
    ),
    "falcon": _family("Falcon", multi_query=True, new_decoder_architecture=False),
    "falcon-alibi": _family("Falcon", alibi=True, multi_query=False, new_decoder_architecture=False),
    "mixtral": _family("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v2": _family("DeepseekV2", **_LATENT),
    "deepseek-v3": _family("DeepseekV3", **_LATENT),
    "llama4": _family(
        "Llama4Text",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=20,
        layer_types=["chunked_attention", "chunked_attention", "full_attention"],
        no_rope_layers=[1, 1, 0],
    ),
    "starcoder2": _family("Starcoder2", sliding_window=WINDOW + 1),
    "olmo2": _family("Olmo2"),
    "olmoe": _family("Olmoe", num_experts=4, num_experts_per_tok=2),
    "granite": _family("Granite"),
    "granite-moe": _family("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    "cohere": _family("Cohere"),
    "cohere2": _family("Cohere2", sliding_window=WINDOW, layer_types=_MIXED),
    "stablelm": _family("StableLm"),
    "glm4": _family("Glm4", head_dim=8),
    "nemotron": _family("Nemotron"),
    "smollm3": _family("SmolLM3"),
    "exaone4": _family("Exaone4", sliding_window=WINDOW, layer_types=_MIXED),
    "ernie4.5": _family("Ernie4_5", head_dim=8),
    "helium": _family("Helium", head_dim=8),
    "persimmon": _family("Persimmon"),
    "codegen": _family("CodeGen", _GPT, rotary_dim=4),
}


def build(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """The model `name` of `CONFIGS`."""
    return tiny(CONFIGS[name](), dtype, attention)


def tiny(config: Any, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """A model with seeded weights.

    They are drawn large enough for attention to matter: with transformers' own initialisation a token's logits hardly
    depend on the tokens before it, and no test would notice a missing chunk.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.5 / math.sqrt(parameter.shape[-1])))
            else:  # biases and norms start as zeros or ones
                parameter.add_(noise, alpha=0.2)
    return model.eval()
