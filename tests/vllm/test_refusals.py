"""What cannot work is refused when the engine starts, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_engine import TinyEngine

from cakekv.errors import BadOption, UnsupportedEngine


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
