from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reuse_ttft import Asked, measure
from cakekv.bench.servers import valkey_behind
from cakekv.bench.ttft import write_ttft
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.store.opening import open_store
from tests.threads import single_thread


def test_computing_and_reusing_take_turns() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    set_to: list[float | None] = []
    asked = Asked([1, 2, 3], [[(k * n + 3) % 50 for k in range(160)] for n in (7, 9)], [4, 5])
    with (
        single_thread(),
        valkey_behind() as url,
        open_store(url) as store,
        Cake(TransformersEngine(LlamaForCausalLM(config)), None, None) as loaded,
    ):
        points = measure(loaded, store, asked, ["epic:link=16", "turned"], 2, set_to.append)
    assert [(point["engine"], point["method"]) for point in points] == [
        ("embedded", "epic:link=16"),
        ("embedded", "turned"),
    ]
    assert set_to == [points[0]["bandwidth_bytes_per_s"]]
    for point in points:
        assert point["ratio"] == point["reuse_s"] / point["compute_s"]
        assert point["prompt_tokens"] == 325
        assert {len(values) for values in point["repeats"].values()} == {2}
    # What compute reaches first is exact; what is left of a document is reused without its link.
    for reused in points[0]["repeats"]["reused_tokens"]:
        assert reused <= 2 * (160 - 16)


def test_entries_of_other_engines_stay(tmp_path: Path) -> None:
    file = tmp_path / "reuse.json"
    write_ttft(file, "vllm", [{"engine": "vllm", "method": "epic:link=16", "ratio": 0.5}])
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"methods": [{"name": "turned"}]}))
    for ratio in (0.7, 0.6):
        write_ttft(file, "embedded", [{"engine": "embedded", "method": "turned", "ratio": ratio}])
    data = json.loads(file.read_text())
    assert data["methods"] == [{"name": "turned"}]
    assert [(one["engine"], one["ratio"]) for one in data["ttft"]] == [("vllm", 0.5), ("embedded", 0.6)]
