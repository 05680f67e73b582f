from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.packing import EXPONENTS, measure, segments_of
from cakekv.engine.transformers import TransformersEngine


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_a_cache_is_packed_nearly_as_small_as_its_entropy(dtype: str) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    engine = TransformersEngine(LlamaForCausalLM(config).to(getattr(torch, dtype)))
    segments = segments_of(engine, [7 * k % 50 for k in range(200)], 64)
    itemsize = EXPONENTS[dtype][0] // 8
    assert [[len(plane) for plane in planes] for planes in segments] == [[2 * 64 * 32 * itemsize] * 2] * 2 * 3
    found = measure(segments, dtype, repeats=2)
    assert found["identical"]
    assert 1.1 < found["ratio"] < found["entropy_ratio"] < 1.05 * found["ratio"]
    assert found["encode_gbps"] > 0
    assert found["decode_gbps"] > 0
