"""What cannot work is refused when the engine starts, in words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

import pytest
from tiny_engine import TinyEngine

from cakekv.errors import BadOption, UnsupportedEngine

GPT_OSS = Some(model_type="gpt_oss")
"""Without its hybrid allocator, vLLM itself answers differently every time on a CPU, unless it has one thread."""


def refusal(model: Path, cake: dict[str, Any], **engine: Any) -> str:
    """What starting the engine says."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    try:
        with pytest.raises((UnsupportedEngine, BadOption)) as refused:
            TinyEngine(model, {"store": "scripted://refused"} | cake, **engine)
    finally:
        ensure_kv_transfer_shutdown()
    return str(refused.value)


def test_a_scheduler_that_knows_nothing_of_restores(model: Path) -> None:
    message = refusal(model, {}, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    assert "--scheduler-cls cakekv.vllm.CakeScheduler" in message


def test_chunks_that_are_no_blocks(model: Path) -> None:
    assert "multiple of vLLM's block size of 128" in refusal(model, {"chunk_tokens": 100})


def test_two_connectors(model: Path) -> None:
    two = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    "kv_connector": "CakeConnector",
                    "kv_connector_module_path": "cakekv.vllm",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"store": "scripted://refused"},
                },
                {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"},
            ]
        },
    }
    assert "MultiConnector" in refusal(model, {}, kv_transfer_config=two)


def test_windows(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=256)).save_pretrained(tmp_path)
    assert "SlidingWindowSpec" in refusal(tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"multimodal_config.mm_processor_cache_gb": 0}, None),
        (
            {"multimodal_config.mm_processor_cache_gb": 0, "cache_config.enable_prefix_caching": False},
            "one would be taken for another",
        ),
        ({"scheduler_config.disable_chunked_mm_input": True}, "in one piece"),
        ({"model_config.is_mm_prefix_lm": True}, "in one piece"),
        ({"aux_output_config.enabled": True}, "--enable-return-routed-experts"),
        ({"attention_config.hisparse_config": "any"}, "HiSparse"),
        ({"model_config.hf_text_config": GPT_OSS}, "gpt-oss on a CPU"),
        ({"model_config.hf_text_config": GPT_OSS, "device_config.device_type": "cuda"}, None),
    ],
)
def test_what_cannot_be_started_here(settings: dict[str, Any], words: str | None) -> None:
    """By configurations: no multimodal model is small enough, and some of vLLM's options want a GPU."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from cakekv.vllm.support import check_engine

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.float32)
    multimodal = Some(mm_processor_cache_gb=4)
    config = Some(
        multimodal_config=multimodal,
        model_config=Some(multimodal_config=multimodal, is_mm_prefix_lm=False, hf_text_config=Some(model_type="llama")),
        device_config=Some(device_type="cpu"),
        cache_config=Some(enable_prefix_caching=True),
        scheduler_config=Some(enable_chunked_prefill=True, disable_chunked_mm_input=False),
        parallel_config=Some(pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1),
        aux_output_config=Some(enabled=False),
        attention_config=Some(hisparse_config=None),
    )
    for name, value in settings.items():
        part, _, field = name.partition(".")
        setattr(getattr(config, part), field, value)
    caches: Any = Some(kv_cache_groups=[Some(kv_cache_spec=spec)])
    if words is None:
        check_engine(config, caches)
        return
    with pytest.raises(UnsupportedEngine, match=words):
        check_engine(config, caches)
