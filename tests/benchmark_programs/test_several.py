from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import several
from cakekv.engine.transformers import TransformersEngine
from cakekv.restore.priority import POLICIES


def test_every_policy_serves_every_number_of_requests(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    engine = TransformersEngine(LlamaForCausalLM(config).float())
    token_ids = [number * number % 47 for number in range(400)]
    said: list[str] = []
    result = several.measure(
        engine,
        token_ids,
        tmp_path / "store",
        long=256,
        plain=100,
        counts=[2, 3],
        apart_s=0.001,
        repeats=2,
        chunk_tokens=16,
        max_span_tokens=64,
        on_run=said.append,
    )
    names = {*POLICIES, several.IN_TURN}
    assert {(point["requests"], point["policy"]) for point in result["points"]} == {
        (count, name) for count in (2, 3) for name in names
    }
    assert len(said) == 2 * 2 * len(names)
    for point in result["points"]:
        assert len(point["repeats_s"]) == 2
        assert all(len(ttfts) == point["requests"] for ttfts in point["repeats_s"])
        assert 0 < point["mean_s"] <= point["max_s"]
    assert set(result["alone_s"]) == {"long", "plain"}
