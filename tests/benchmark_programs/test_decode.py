"""What the programs behind benchmarks/decode.json measure of LESS and KVSharer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kvsharer import claim, divergence, logits, nll
from benchmarks.less import errors, gap
from cakekv.bench.quality.documents import Document
from cakekv.decode.less_kernels import Learned
from cakekv.decode.less_training import Settings, collect, fit
from cakekv.engine.sharing import LayerMap
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import build

TEXT = [(k * k + 3 * k) % 97 + 3 for k in range(80)]


def test_less_is_compared_with_the_full_cache() -> None:
    engine = TransformersEngine(build("llama"))
    settings = Settings(recent=(8,), features=4, hidden=8, epochs=1)
    learned = Learned(
        {layer.number: fit(layer, settings).kernels for layer in collect(engine, [TEXT[:40], TEXT[40:]])}, {}
    )
    document = Document("text", TEXT[:64], TEXT[64:68], [])
    found = errors(engine, learned, [document], 8)
    assert list(found) == ["0", "1", "2"]
    assert all(0 < one["four_more"] < one["without"] for one in found.values())
    missing = gap(engine, learned, document, 8)
    assert min(missing.values()) > 1e-7
    assert list(missing) == ["without", "four_more", "less"]
    assert gap(engine, learned, document, 100) == pytest.approx(dict.fromkeys(missing, 0.0), abs=1e-6)


def test_sharing_is_compared_with_the_model() -> None:
    engine = TransformersEngine(build("llama"))
    with torch.inference_mode():
        output = engine.model(torch.tensor([TEXT])).logits[0].log_softmax(-1)
    found = logits(engine, TEXT, None)
    torch.testing.assert_close(found.float(), output, rtol=2e-3, atol=2e-3)
    assert nll(output, TEXT) == pytest.approx(
        -sum(float(output[at, token]) for at, token in enumerate(TEXT[1:])) / 79, rel=1e-4
    )
    shared = logits(engine, TEXT, LayerMap(((0, 2),)))
    assert divergence(found, found) == 0 < divergence(shared, found)
    row = {"layers": 4, "perplexity": 9.0}
    rows: dict[str, Any] = {
        "unshared": 1,
        "dissimilar, 4 layers": row,
        "similar, 4 layers": {**row, "perplexity": 10.0},
    }
    rows |= {"random 0, 4 layers": {**row, "perplexity": 9.5}}
    losses = {(name, 4): [loss] * 3 for name, loss in (("dissimilar", 2.0), ("similar", 2.3), ("random 0", 2.1))}
    said = claim(rows, losses, 4, 1)
    assert said.holds
    assert said.measured["nats_better_than_similar"] == pytest.approx([0.3] * 3)
    assert said.measured["random_seeds_beaten"] == 1
    rows["similar, 4 layers"]["perplexity"] = 8.9
    assert not claim(rows, losses, 4, 1).holds
