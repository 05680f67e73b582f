from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.compress_ttft import RAW, described, measure
from cakekv.bench.servers import valkey_behind
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from tests.threads import single_thread

WAYS = [RAW, "int8", "raw+key_norm:share=0.5", "int8+key_norm:share=0.5"]


def test_ways_to_store_a_prefix_take_turns() -> None:
    """Over a server, at two bandwidths (that nothing limits here)."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    set_to: list[float | None] = []
    prompt = [7 * k % 50 for k in range(256 + 20)]
    with (
        single_thread(),
        valkey_behind() as url,
        Cake(TransformersEngine(LlamaForCausalLM(config)), None, None) as loaded,
    ):
        points = measure(loaded, url, prompt, 256, WAYS, [1.0, 2.0], 2, set_to.append)
    assert [(point["bandwidth_ratio"], point["method"]) for point in points] == [
        (r, way) for r in (1, 2) for way in WAYS
    ]
    assert set_to == [points[0]["bandwidth_bytes_per_s"], 2 * points[0]["bandwidth_bytes_per_s"]]
    for number, point in enumerate(points):
        assert point["ratio"] == point["ttft_s"] / points[number // 4 * 4]["ttft_s"]
        assert {len(values) for values in point["repeats"].values()} == {2}
        assert described(point).startswith(f"{point['method']}, 256 tokens in ")
    sizes = [point["stored_bytes"] for point in points[:4]]
    assert sizes[2] < 0.6 * sizes[0]
    assert sizes[3] < 0.7 * sizes[1]
    assert [round(point["kept_share"], 1) for point in points[:4]] == [1.0, 1.0, 0.5, 0.5]
