"""The judge of methods that keep fewer tokens: what it says is what the model says over what is left."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.bench.quality.compress import EXACT, CompressResults, follow_singly, judge, way_named
from cakekv.bench.quality.documents import Document, Needle
from cakekv.cake import Cake
from cakekv.compress import method_named
from cakekv.compress.base import Layer, Method
from cakekv.compress.sink_recent import SinkRecent
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.store.memory import MemoryStore

CONTEXT = [(k * k + 3 * k) % 47 for k in range(100)]
NEEDLES = [Needle((8, 9), (4, 30)), Needle((11,), (5, 6))]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return TransformersEngine(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def document(engine: TransformersEngine) -> Document:
    """Its first needle is answered by the full cache, since that is what its answer was taken from."""
    continuation = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    asked = [*CONTEXT, *continuation, 8, 9]
    answer = int(engine.compute(engine.new_cache(200), asked, 0).argmax())
    return Document("text", CONTEXT, continuation, [Needle((8, 9), (answer,)), *NEEDLES[1:]])


def ways(*recipes: str) -> dict[str, Any]:
    return {recipe: way_named("compress", recipe) for recipe in recipes}


def test_answers_over_what_is_left_are_compared_with_those_over_everything(
    engine: TransformersEngine, document: Document
) -> None:
    half, all_of_it, growing = "sink_recent:share=0.5", "sink_recent:share=1", "sink_recent:recent=46"
    found = judge(engine, document, ways(half, all_of_it, growing) | {"whole": way_named("decode", "whole")})
    exact = found[EXACT]
    assert exact.kl == pytest.approx(0.0, abs=1e-6)
    assert (exact.agreement, exact.kept, exact.choose_s) == (1.0, 1.0, 0.0)
    assert exact.asked == exact.found >= 1
    for name in (all_of_it, "whole"):
        assert found[name].kl == pytest.approx(0, abs=1e-6)
        assert (found[name].agreement, found[name].found) == (1, exact.asked)
    assert found[half].kept == found[growing].kept == 0.5
    assert found[half].cache_bytes * 2 == found[all_of_it].cache_bytes == exact.cache_bytes
    assert found[half].kl > 1e-3

    # the same, told from the model alone: what is left of the prompt stays, and then the window moves on
    context, tail = document.context, document.tail
    cache = engine.new_cache(len(context))
    engine.compute(cache, context, 0)
    left = engine.compress(cache, context, SinkRecent(share=0.5))
    likely = torch.stack([engine.compute(left, [token], 100 + at) for at, token in enumerate(tail[:9])]).log_softmax(-1)
    gold = torch.tensor(document.continuation[1:])
    assert found[half].nats == pytest.approx(-float(likely.gather(1, gold[:, None]).mean()), abs=1e-4)
    assert found[growing].nats != pytest.approx(found[half].nats, abs=1e-4)


@dataclass(frozen=True)
class Counting(Method):
    """Notes what it is shown."""

    name: ClassVar[str] = "counting"
    times: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})
    stride: ClassVar[int] = 3
    shown: ClassVar[list[int]] = []
    marked: ClassVar[list[Any]] = []

    def keep(self, layers: Any) -> Any:
        self.marked.append([tuple(mark) for mark in layers[0].marked])
        return [None] * len(layers)

    def step(self, layer: Layer) -> None:
        assert layer.queries is not None
        if layer.index == 0:
            self.shown.append(layer.queries.shape[1])


def test_a_method_that_acts_on_steps_is_fed_in_its_strides(engine: TransformersEngine, document: Document) -> None:
    judge(engine, document, {"counting": Counting()})
    tokens = len(document.tail) - 1
    assert Counting.shown == [3] * (tokens // 3)
    assert Counting.marked == [[]]


def test_the_question_may_be_part_of_the_prompt(engine: TransformersEngine, document: Document) -> None:
    Counting.marked.clear()
    last = "heavy_hitter:share=0.3,rows=1"
    found = judge(engine, document, {"counting": Counting()} | ways(last), question_first=True)
    assert Counting.marked == [[(100, 102, "question")], [(100, 101, "question")]]
    assert found["counting"].kl == pytest.approx(0, abs=1e-6)
    assert found["counting"].gold_nats == pytest.approx(found[EXACT].gold_nats, abs=1e-4)
    assert found[last].gold_nats != pytest.approx(judge(engine, document, ways(last))[last].gold_nats)


def test_methods_that_look_at_the_same_rows_choose_as_if_alone(engine: TransformersEngine, document: Document) -> None:
    recipes = ("heavy_hitter:share=0.3", "heavy_hitter:share=0.6", "kvmerger:share=0.5,first_layers=0,last_layers=0")
    together = judge(engine, document, ways(*recipes, "corm:window=20,recent=20", "vl_cache:share=0.3,window=20"))
    for recipe in together.keys() - {EXACT}:
        alone = judge(engine, document, ways(recipe))[recipe]
        assert replace(together[recipe], choose_s=0, token_s=0) == replace(alone, choose_s=0, token_s=0)
        assert 0 < together[recipe].kept < 1
    cache = engine.new_cache(100)
    engine.compute(cache, CONTEXT, 0)
    by_itself = engine.compress(cache, CONTEXT, method_named(recipes[2]))
    assert by_itself.kept_share == together[recipes[2]].kept


@pytest.mark.parametrize("recipe", ["key_norm:share=0.5", "kvmerger:share=0.6,first_layers=0,last_layers=0,when=store"])
def test_what_is_stored_is_judged_as_it_is_loaded(engine: TransformersEngine, document: Document, recipe: str) -> None:
    found = judge(engine, document, ways(recipe, "sink_recent"), chunk_tokens=48)
    with Cake(engine, store=MemoryStore(), chunk_tokens=48, compress=recipe) as cake:
        cake.prefill(CONTEXT)
        cake.wait_saved()
        loaded = cake.prefill(CONTEXT, mode="load", room=len(document.tail))
    assert loaded.report.loaded_tokens == 96
    assert found[recipe].kept == pytest.approx(loaded.report.kept_share)
    assert found[recipe].kept < 0.7
    tail, count = document.tail, len(document.continuation) - 1
    likely = engine.logits(loaded.cache, tail[:count], 100).log_softmax(-1)
    gold = torch.tensor(document.continuation[1:])
    assert found[recipe].nats == pytest.approx(-float(likely.gather(1, gold[:, None]).mean()), abs=1e-4)
    assert found[recipe].nats != pytest.approx(found[EXACT].nats, abs=1e-3)


def test_logits_are_those_of_every_token(engine: TransformersEngine) -> None:
    cache = engine.new_cache(120)
    engine.compute(cache, CONTEXT, 0)
    at_once, _ = follow_singly(engine, cache, [3, 4, 5, 6], 100, [4])
    one_by_one, seconds = follow_singly(engine, cache, [3, 4, 5, 6], 100, [1, 1, 2])
    assert at_once.shape == (4, 50)
    assert torch.allclose(at_once, one_by_one, atol=1e-5)
    assert seconds > 0


def test_a_run_goes_on_where_it_stopped(engine: TransformersEngine, document: Document, tmp_path: Path) -> None:
    file, run = tmp_path / "compress.json", {"command": "first", "machine": {"processor": "one"}}
    settings = {"model": "tiny", "dtype": "float32", "documents": 2, "tokens": 100, "continuation": 10}
    settings["questions"] = "last"
    documents = [document, replace(document, context=document.context[::-1])]

    def results(*recipes: str, **other: Any) -> CompressResults:
        new = CompressResults(run | {"command": "then"}, settings | other, dict.fromkeys(recipes, "compress"))
        new.read(file)
        return new

    first = CompressResults(run, settings, {"sink_recent": "compress", "whole": "decode"})
    first.judge(engine, 0, documents[0])
    file.write_text(json.dumps(first.to_dict()))
    second = results("heavy_hitter")
    assert not second.is_complete
    for number, one in enumerate(documents):
        second.judge(engine, number, one)
    assert second.is_complete
    data = second.to_dict()
    assert data["command"] == "first; then then"
    assert [(one["name"], one["option"]) for one in data["methods"]] == [
        (EXACT, None),
        ("sink_recent", "compress"),
        ("whole", "decode"),
        ("heavy_hitter", "compress"),
    ]
    for one in data["methods"][1:]:
        assert len(one["documents"]) == 2
        low, high = one["intervals"]["kl"]
        assert low <= one["kl"] <= high
    assert [(pair["a"], pair["b"]) for pair in data["paired"]][1] == ("sink_recent", "heavy_hitter")
    assert data["paired"][1]["kl"] == pytest.approx(data["methods"][1]["kl"] - data["methods"][3]["kl"])

    file.write_text(json.dumps(data))
    with pytest.raises(BadInput, match="tokens 100, and this is 99"):
        results(tokens=99)
    with pytest.raises(BadInput, match="has 2 documents"):
        results(documents=1)
    with pytest.raises(BadInput, match="chunk_tokens 64, and this is 16"):
        results(chunk_tokens=16)
    with pytest.raises(BadInput, match="not those that are judged now"):
        results("sink_recent:share=0.3").judge(engine, 0, documents[1])
    file.write_text(json.dumps(data).replace('\\"compress\\":\\"heavy_hitter\\"', '\\"compress\\":\\"another\\"'))
    assert not results().is_complete  # the method has changed, and is judged again
    file.write_text("{}")
    with pytest.raises(BadInput, match="cannot add"):
        results()
