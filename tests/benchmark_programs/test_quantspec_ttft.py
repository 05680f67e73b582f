from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quantspec_ttft import claims, measure
from cakekv.bench.servers import valkey_behind
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from tests.threads import single_thread


def test_patient_and_hasty_answers_take_turns() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    prompt = [7 * k % 50 for k in range(256 + 20)]
    set_to: list[float | None] = []
    engine = TransformersEngine(LlamaForCausalLM(config))
    engine.stop_tokens = frozenset()
    with single_thread(), valkey_behind() as url, Cake(engine, None, None) as loaded:
        runs, bandwidth = measure(loaded, url, prompt, 256, 2, 2, set_to.append)
    assert set_to == [bandwidth]
    assert {way: len(ones) for way, ones in runs.items()} == {"patient": 2, "hasty": 2}
    for way, ones in runs.items():
        for one in ones:
            assert len(one.token_ids) == 5
            assert 0 < one.draft_s <= one.first_s < one.fifth_s
            assert way == "hasty" or one.draft_s == one.first_s
    drafting, fifth = claims(runs)
    assert drafting.holds == (drafting.measured["hasty"]["draft_s"] < drafting.measured["patient"]["first_s"])
    assert fifth.measured["hasty"] == drafting.measured["hasty"]["fifth_s"]
