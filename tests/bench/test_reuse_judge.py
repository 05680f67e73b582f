from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.bench.quality.documents import Document, Needle
from cakekv.bench.quality.judge import follow
from cakekv.bench.quality.rag import make_prompt, make_prompts
from cakekv.bench.quality.reuse import EXACT, Answers, Measured, ReuseResults, claims, judge, summary
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput


class Characters:
    """One token per character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(one) for one in text]}


def text(ids: Any) -> str:
    return "".join(map(chr, ids))


def document(first: int, fact: int) -> Document:
    needles = [Needle((first,), (fact,)), Needle((7,), (fact,))]
    return Document("text", [(first * k + 3) % 50 for k in range(100)], [1, 2, 3], needles)


def tiny() -> TransformersEngine:
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


def test_prompts_of_documents_are_compared_with_the_exact_cache() -> None:
    engine = tiny()
    prompt = make_prompt([document(9, 4), document(11, 5), document(13, 6)], [Needle((8, 9), (4, 30), documents=2)])
    assert [needle.question for needle in prompt.whole.needles[:3]] == [(9,), (11,), (13,)]  # (7,) is in all of them
    assert len(prompt.whole.context) == 300
    found = judge(engine, prompt, ["naive", "epic:link=0", "turned", "epic:link=16", "epic:link=100"])
    exact, whole = found[EXACT], found["epic:link=100"]
    assert found["turned"] == found["epic:link=0"]
    assert found["naive"].kl != found["turned"].kl > 1e-3
    assert whole.kl < 1e-6
    assert whole.agreement == 1.0
    assert [(one.one.facts, one.two.facts) for one in found.values()] == [(3, 1)] * 6
    assert all(one.one.right_digits == one.one.all_found for one in found.values())  # such an answer is one token here
    assert (whole.one[:-1], whole.two[:-1]) == (exact.one[:-1], exact.two[:-1])
    assert exact.asked == exact.found == exact.both.all_found
    assert [one.recomputed for one in found.values()] == [0.0, 0.0, 0.0, 0.0, 32 / 300, 200 / 300]

    with Cake(engine) as cake:  # the likelihood of the answer to the last question, told from the model alone
        logits = follow(engine, cake.prefill(prompt.whole.context, room=20).cache, prompt.whole)
    likely = torch.log_softmax(logits[-2:], -1)
    assert exact.two.gold_nats == pytest.approx(float(likely[0, 4] + likely[1, 30]), abs=1e-4)
    assert whole.two.gold_nats == pytest.approx(exact.two.gold_nats, abs=1e-4)

    figures = summary("turned", [found["turned"]] * 2, [exact] * 2)
    turned = found["turned"]
    assert figures["kl"] == turned.kl
    assert figures["intervals"]["kl"] == [figures["kl"]] * 2
    assert figures["gold_nats_two"] == pytest.approx(turned.two.gold_nats / 2)
    assert figures["gold_nats_lost_two"] == pytest.approx((exact.two.gold_nats - turned.two.gold_nats) / 2)
    assert (figures["facts"], figures["facts_two"]) == (8, 2)
    assert Measured.of_dict(json.loads(json.dumps(turned.to_dict()))) == turned


def test_some_questions_need_two_documents() -> None:
    prompts = make_prompts(Characters(), 3, [2, 5], 700, 50)
    assert prompts[:2] == make_prompts(Characters(), 2, [2, 5], 700, 50)
    assert [len(prompt.parts) for prompt in prompts] == [2, 5, 2]
    assert {len(part) for prompt in prompts for part in prompt.parts} == {700}
    for prompt in prompts:
        parts = [text(part) for part in prompt.parts]
        two = [needle for needle in prompt.whole.needles if needle.documents == 2]
        assert len(two) == len(parts) // 2
        for needle in two:
            keeper = text(needle.question).split()[-3]
            (who,) = [part for part in parts if f"{keeper} keeps the " in part]
            thing = who.split(f"{keeper} keeps the ")[1].split(".")[0]
            (code,) = [part for part in parts if f"The secret code of the {thing} is{text(needle.answer)}." in part]
            assert who is not code
        for needle in prompt.whole.needles[: -len(two)]:
            name = text(needle.question).split()[-2]
            assert text(prompt.whole.context).count(f"secret code of {name} is{text(needle.answer)}.") == 1
    for number in (1, 25):
        with pytest.raises(BadInput, match="2 to 24"):
            make_prompts(Characters(), 1, [number], 700, 50)


def measured(kl: float, recomputed: float = 0.0) -> Measured:
    return Measured(kl, 0.5, recomputed, Answers(), Answers())


def test_claims_hold_or_fail_by_what_was_measured() -> None:
    judged = {
        "naive": [measured(1.0), measured(3.0)],
        "turned": [measured(0.2), measured(0.6)],
        "epic:link=16": [measured(0.16, 0.06), measured(0.48, 0.06)],
        "blend:recompute=0.15": [measured(0.08, 0.15), measured(0.24, 0.15)],
        "blend:recompute=0.15,choice=random": [measured(0.08, 0.15), measured(0.24, 0.15)],
        "blend:recompute=0.3": [measured(0.09, 0.3), measured(0.25, 0.3)],
    }
    found = claims(judged)
    assert [one["measured"] for one in found] == pytest.approx([0.8, 0.2, 0.06, 0.6, 0.0, 1 - 0.34 / 0.32])
    assert [one["holds"] for one in found] == [True, False, False, True, False, False]
    assert found[0]["interval"] == [pytest.approx(0.8)] * 2  # paired: it is the same on every prompt
    assert claims({"turned": judged["turned"]}) == []


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    engine, file = tiny(), tmp_path / "reuse.json"
    prompts = [make_prompt([document(9, 4), document(k, 5)]) for k in (11, 13, 17)]
    run = {"command": "first", "machine": {"processor": "one"}}
    settings = {"model": "tiny", "dtype": "float32", "documents": [2], "tokens": 100, "continuation": 3}
    settings |= {"chunk_tokens": 64, "prompts": 3}

    def results(add: bool, *ways: str, **other: Any) -> ReuseResults:
        new = ReuseResults(run | {"command": "then"} if add else run, settings | other, ways)
        if file.exists():
            new.read(file, add=add)
        return new

    file.write_text(json.dumps({"ttft": [{"engine": "vllm"}]}))
    first = results(True, "turned")
    for number in (0, 1):
        first.judge(engine, number, prompts[number])
    file.write_text(json.dumps(first.to_dict()))
    second = results(True, "epic:link=8")
    assert not second.is_complete
    for number, prompt in enumerate(prompts):
        second.judge(engine, number, prompt)
    assert second.is_complete
    at_once = ReuseResults(run, settings, ["turned", "epic:link=8"])
    for number, prompt in enumerate(prompts):
        at_once.judge(engine, number, prompt)
    data, same = second.to_dict(), at_once.to_dict()
    assert data["command"] == "then; then then"
    assert data["ttft"] == [{"engine": "vllm"}]
    assert [one["name"] for one in data["methods"]] == ["exact", "turned", "epic:link=8"]
    for one, other in zip(data["methods"], same["methods"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], 1e-3, 1e-6)
    assert [(pair["a"], pair["b"]) for pair in data["paired"]] == [("turned", "epic:link=8")]

    file.write_text(json.dumps(data))
    with pytest.raises(BadInput, match="tokens 100, and this is 99"):
        results(True, "turned", tokens=99)
    with pytest.raises(BadInput, match="has 3 prompts"):
        results(True, "turned", prompts=2)
    with pytest.raises(BadInput, match="not those that are judged now"):
        results(True, "epic:link=4").judge(engine, 0, make_prompt([document(9, 4)] * 2))
    assert results(False, "turned").to_dict()["ttft"] == data["ttft"]  # begun anew, but for what others measured
    file.write_text("{}")
    with pytest.raises(BadInput, match="cannot add"):
        results(True, "turned")
