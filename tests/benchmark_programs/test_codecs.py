"""The benchmarks of codecs, at the smallest size: what they write is what happened."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import adaptive_level, table6
from cakekv.bench.quality.documents import Document
from cakekv.engine.transformers import TransformersEngine

CHUNK = 64


class Paced(TransformersEngine):
    """Computes at 0.4 ms a token, so that what machine this is matters less."""

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        time.sleep(0.0004 * len(token_ids))
        return super().compute(cache, token_ids, start, gate)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
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
    return Paced(LlamaForCausalLM(config).to(torch.bfloat16))


def test_an_adaptive_level_beside_fixed_ones(engine: TransformersEngine, tmp_path: Path) -> None:
    chance = random.Random(2)
    texts = [[chance.randrange(50) for _ in range(8 * CHUNK + 20)] for _ in range(2)]
    documents = [Document("text", text[: 8 * CHUNK], text[8 * CHUNK :], []) for text in texts]
    data: dict[str, Any] = {}
    store = tmp_path / "store"
    assert sum(1 for _ in adaptive_level.measure(engine, documents, store, data, max_span_tokens=CHUNK)) == 1
    assert data["ttft_target_s"] > 0
    rates = data["trace"]["bytes_per_s"]
    assert min(rates) < data["balanced_bytes_per_s"] / 2 < max(rates)
    for document in data["documents"]:
        for name in ("1 of 3", "2 of 3", "3 of 3"):
            assert set(document[name]["level_tokens"]) <= {"exact", name}
        for name in adaptive_level.COLOURS:
            one = document[name]
            loaded = sum(one["level_tokens"].values())
            assert loaded + one["computed_tokens"] == 8 * CHUNK + 20
            assert (one["kl"] > 0) == (one["lossy_share"] > 0)
    assert list(data["variants"]) == list(adaptive_level.COLOURS)
    adaptive_level.draw(data, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_table_6(engine: TransformersEngine, tmp_path: Path) -> None:
    chance = random.Random(2)
    prompt = [chance.randrange(50) for _ in range(4 * CHUNK + 9)]
    data: dict[str, Any] = {}
    assert sum(1 for _ in table6.measure(engine, prompt, 4 * CHUNK, [0.5, 2.0], 2, tmp_path, data)) == 2
    assert [(cell["bits"], cell["bandwidth_ratio"]) for cell in data["cells"]] == [
        (bits, ratio) for ratio in (0.5, 2.0) for bits in (16, 8, 3)
    ]
    assert data["stored"]["raw"]["ratio"] == 1 < data["stored"]["int8"]["ratio"] < data["stored"]["nuq3"]["ratio"]
    for cell in data["cells"]:
        assert cell["over_load"] == cell["load_s"] / cell["both_s"]
        assert len(cell["repeats"]["both_s"]) == 2
        assert cell["predicted_both_s"] > 0
        assert min(cell["predicted_over_load"], cell["predicted_over_compute"]) > 0.5
