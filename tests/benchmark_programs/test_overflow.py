from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.overflow import METHODS, judge, summary
from cakekv.bench.quality.documents import Document
from cakekv.engine.transformers import TransformersEngine


def test_truncated_texts_are_compared_with_computing_them() -> None:
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
    text = [(k * k + 3 * k) % 47 for k in range(280)]
    found = judge(engine, Document("text", text[:256], text[256:], []), range(64, 160))
    assert list(found) == list(METHODS)
    assert [one.moved for one in found.values()] == [0, 96, 96, 0]
    assert len({one.nll for one in found.values()}) == 4
    nothing = judge(engine, Document("text", text[:256], text[256:], []), range(64, 64))
    assert all(one.nll == pytest.approx(nothing["computed"].nll, abs=1e-5) for one in nothing.values())
    figures = summary("moved", [found["moved"]] * 2, [found["computed"]] * 2)
    assert figures["ppl"] == pytest.approx(math.exp(found["moved"].nll))
    assert figures["ppl_change"] == pytest.approx(math.exp(found["moved"].nll - found["computed"].nll) - 1)
    assert figures["intervals"]["ppl_change"] == [figures["ppl_change"]] * 2
