from __future__ import annotations

import random

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.cachegen_tables import cached, compare, learn
from cakekv.bench.quality.documents import Document
from cakekv.codec.cachegen import CacheGen
from cakekv.engine.transformers import TransformersEngine


def test_tables_of_ones_own_are_bounds() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    engine = TransformersEngine(LlamaForCausalLM(config).float())
    rng = random.Random(2)
    document = Document("text", [rng.randrange(50) for _ in range(600)], [], [])
    planes = cached(engine, document)
    assert [tuple(array.shape for array in pair) for pair in planes] == [((2, 600, 16),) * 2] * 2
    with torch.inference_mode():
        engine.forward(cache := DynamicCache(config=config), document.context)
    exact = cache.layers[1]
    for array, expected in zip(planes[1], (exact.keys, exact.values), strict=True):
        np.testing.assert_allclose(array, expected[0].numpy(), atol=1e-4)
    codec = CacheGen(level=2)
    bits = compare(codec, learn(codec, [planes]), [planes], 300)
    assert 1.0 < bits["per_channel"] < bits["per_layer"]
    assert bits["per_channel"] < bits["codec"], "what is learned on the document itself is the least there is"
