from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reuse import judge, prompt_of, summary
from cakekv.bench.quality.documents import Document, Needle
from cakekv.engine.transformers import TransformersEngine


def document(first: int, fact: int) -> Document:
    needles = [Needle((first,), (fact,)), Needle((7,), (fact,))]
    return Document("text", [(first * k + 3) % 50 for k in range(100)], [1, 2, 3], needles)


def test_prompts_of_documents_are_compared_with_the_exact_cache() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    engine = TransformersEngine(LlamaForCausalLM(config))
    asked = prompt_of([document(9, 4), document(11, 5), document(13, 6)])
    assert [needle.question for needle in asked.whole.needles] == [(9,), (11,), (13,)]  # (7,) is in all of them
    assert len(asked.whole.context) == 300
    found = judge(engine, asked, ["naive:turn=no", "epic:link=0", "naive", "epic:link=16", "epic:link=100"])
    assert found["naive"] == found["epic:link=0"]
    assert found["naive:turn=no"].kl != found["naive"].kl > 1e-3
    assert found["epic:link=100"].kl < 1e-6
    assert found["epic:link=100"].agreement == 1.0
    assert [one.facts for one in found.values()] == [3] * 6
    assert all(one.right_digits == one.all_found for one in found.values())  # an answer is one token here
    assert found["exact"].right_digits == found["epic:link=100"].right_digits == found["exact"].asked
    assert [one.recomputed for one in found.values()] == [0.0, 0.0, 0.0, 0.0, 32 / 300, 0.0]
    figures = summary("naive", [found["naive"]] * 2)
    assert figures["kl"] == found["naive"].kl
    assert figures["intervals"]["kl"] == [figures["kl"]] * 2
