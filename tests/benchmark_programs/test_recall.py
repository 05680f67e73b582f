from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import recall, recall_ttft
from cakekv.bench.quality.documents import Document, Needle
from cakekv.bench.servers import valkey_behind
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from tests.threads import single_thread

CLUSTERS = "tokens=16,span=128,lazy=yes"
TOKENS = [7 * k % 50 for k in range(256 + 20)]


def engine() -> TransformersEngine:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    return TransformersEngine(LlamaForCausalLM(config))


def test_a_recalled_and_a_whole_prefix_take_turns() -> None:
    set_to: list[float | None] = []
    with single_thread(), valkey_behind() as url, Cake(engine(), None, None) as loaded:
        ways = {"one": f"clusterkv:budget=50,{CLUSTERS}"}
        (claim,) = recall_ttft.measure(loaded, url, TOKENS, 256, [1.0], 1, set_to.append, ways)
    assert len(set_to) == 1
    assert claim.name == "clusterkv lazy ttft: one at 1 times balance"
    assert claim.holds == (claim.measured["ratio"] < 1)
    (recalled,) = claim.measured["recalled_tokens"]
    assert (claim.measured["first_read_bytes"] > 0) == (recalled > 0)


def test_answers_are_compared_token_by_token() -> None:
    needle = Needle((3, 4, 5), (6, 7))
    document = Document("text", TOKENS[:256], [TOKENS[k % 50] for k in range(32)], [needle])
    saved = recall.CLUSTERS
    recall.CLUSTERS = CLUSTERS
    try:
        with single_thread(), Cake(engine(), None, None) as loaded:
            row = recall.compare(loaded, document, ["budget=250", "budget=20"])
    finally:
        recall.CLUSTERS = saved
    assert (row["tokens"], row["prompts"]) == (16 + 2, 2)
    assert row["whole_bytes"] > 0
    assert row["budget=20"]["bytes"] <= row["budget=250"]["bytes"]
    assert row["budget=250"]["same"] >= 17
    for claim in recall.claims([row], ["budget=250", "budget=20"], 256):
        assert 0 <= claim.measured["agreement"] <= 1
        assert claim.holds == (claim.measured["agreement"] >= recall.AGREEMENT)
