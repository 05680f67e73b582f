"""ClusterKV's figures, in small: what is counted is what happens."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.clusterkv import claims_of, judged
from benchmarks.clusterkv_reach import Reach
from cakekv.bench.quality.documents import Document, Needle
from cakekv.decode.clusterkv import ClusterKV
from cakekv.decode.pages import Pages
from cakekv.engine.transformers import TransformersEngine


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=400,
        initializer_range=0.2,
    )
    return TransformersEngine(LlamaForCausalLM(config).float())


def test_a_budget_for_nearly_all_misses_nearly_nothing(engine: TransformersEngine) -> None:
    rng = random.Random(2)
    context = [rng.randrange(50) for _ in range(300)]
    document = Document("text", context, context[:20], [Needle((1, 2), (3,))])
    sights = [kind(budget=budget) for budget in (40, 290) for kind in (ClusterKV, Pages)]
    row = judged(engine, document, sights)
    for name in ("clusterkv", "pages"):
        assert row[f"{name} 290"]["recall"] > 0.95
        assert 0.1 < row[f"{name} 40"]["recall"] < row[f"{name} 290"]["recall"]
        assert row[f"{name} 290"]["kl"] < row[f"{name} 40"]["kl"]
    claims = claims_of(300, [row, row], sights)
    assert len(claims) == 6
    assert [claim.holds for claim in claims if claim.name.endswith("40 of 300 tokens, recall")] == [
        row["clusterkv 40"]["recall"] > row["pages 40"]["recall"]
    ]


def test_what_a_first_token_selects_is_counted(engine: TransformersEngine) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(50) for _ in range(257)]
    cache = engine.new_cache(257)
    engine.compute(cache, prompt[:256], 0)
    reach = Reach((ClusterKV(budget=32), ClusterKV(budget=128)), 256, 16)
    engine.compute(engine.look(cache, prompt[:256], reach), prompt[256:], 256)
    least, most = reach.shares(32), reach.shares(128)
    for shares in (least, most):
        assert shares["rows"] <= shares["segments"] <= shares["chunks"] <= 1.0
    assert 32 / 256 <= least["rows"] <= 2 * 32 / 256  # two heads of queries share keys
    assert 128 / 256 <= most["rows"] <= 1.0
