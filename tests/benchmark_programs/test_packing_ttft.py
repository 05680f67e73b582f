from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.packing_ttft import measure
from cakekv.bench.servers import valkey_behind
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from tests.threads import single_thread


def tiny() -> Cake:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return Cake(TransformersEngine(LlamaForCausalLM(config).to(torch.bfloat16)), None, None, chunk_tokens=64)


def test_raw_and_packed_chunks_are_restored_in_turn() -> None:
    """Over a server, at two bandwidths (that nothing limits here)."""
    set_to: list[float] = []
    prompt = [7 * k % 50 for k in range(512 + 20)]
    with single_thread(), valkey_behind() as url, tiny() as cake:
        urls = {form: f"{url}?prefix={form}:&pack={pack}" for form, pack in (("raw", "no"), ("packed", "yes"))}
        points = measure(cake, urls, prompt, 512, [1.0, 2.0], 2, set_to.append)
    assert [point["bandwidth_ratio"] for point in points] == [1.0, 2.0]
    assert set_to == [point["bandwidth_bytes_per_s"] for point in points]
    assert set_to[1] == 2 * set_to[0]
    for point in points:
        check(point)
        assert 1.3 * point["packed_bytes"] < point["raw_bytes"]


def check(point: dict[str, Any]) -> None:
    assert point["packed_of_raw"] == point["packed_s"] / point["raw_s"]
    assert {name: len(values) for name, values in point["repeats"].items()} == {
        "raw_s": 2,
        "packed_s": 2,
        "raw_loaded_tokens": 2,
        "packed_loaded_tokens": 2,
    }


def test_a_disk_of_no_limit(tmp_path: Path) -> None:
    prompt = [7 * k % 50 for k in range(256 + 20)]
    with single_thread(), tiny() as cake:
        urls = {"raw": f"file://{tmp_path}/raw?pack=no", "packed": f"file://{tmp_path}/auto?pack=auto"}
        (point,) = measure(cake, urls, prompt, 256, [None], 2)
    assert point["bandwidth_ratio"] is None
    check(point)
