"""Answers over what is left of a cache, on a model so small that it says nothing right."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.bench.quality.judge import Judge
from cakekv.bench.scbench import task_named
from cakekv.bench.scbench.base import Session
from cakekv.bench.scbench.running import MODES, REQUESTS, TURNS, Answers, Runner, Variant
from cakekv.codec import codec_named
from cakekv.compress import method_named
from cakekv.decode import sight_named
from cakekv.engine.transformers import TransformersEngine

TASK = task_named("kv")
FULL = Variant("full")


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return TransformersEngine(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def session(tokenizer: Any) -> Session:
    return TASK.session(tokenizer, 1, 400)


def run(
    engine: TransformersEngine, tokenizer: Any, session: Session, *variants: Variant, own_answers: bool = False
) -> dict[tuple[str, str], Answers]:
    runner = Runner(engine, tokenizer, {TASK.name: TASK}, own_answers=own_answers)
    return {(name, mode): answers for name, mode, answers in runner.run(session, variants)}


def nats(answers: Answers) -> list[float]:
    return [turn.gold_nats for turn in answers.turns]


def expected(engine: TransformersEngine, tokens: list[int], answer: list[int]) -> float:
    """Mean log-likelihood of the last tokens, by the model alone."""
    with torch.inference_mode():
        logits = engine.model(torch.tensor([tokens])).logits[0, -len(answer) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean())


def greedy(engine: TransformersEngine, tokenizer: Any, tokens: list[int]) -> str:
    said: list[int] = []
    while len(said) < TASK.most and "\n" not in tokenizer.decode(said).lstrip():
        with torch.inference_mode():
            said.append(int(engine.model(torch.tensor([tokens + said])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(said)
    return text.strip().partition("\n")[0]


def test_the_full_cache_answers_as_the_model_does(engine: TransformersEngine, tokenizer: Any, session: Session) -> None:
    found = run(engine, tokenizer, session, FULL)
    history = list(session.context)
    for number, turn in enumerate(session.turns):
        alone = session.context + turn.question
        request, said = found["full", REQUESTS].turns[number], found["full", TURNS].turns[number]
        assert request.gold_nats == pytest.approx(expected(engine, alone + turn.answer, turn.answer), abs=1e-4)
        assert request.said == greedy(engine, tokenizer, alone)
        history += turn.question
        assert said.said == greedy(engine, tokenizer, history)
        history += turn.answer
        assert said.gold_nats == pytest.approx(expected(engine, history, turn.answer), abs=1e-4)
        history += session.end


def test_own_answers_are_in_the_history(engine: TransformersEngine, tokenizer: Any, session: Session) -> None:
    kept = Variant("kept", method=method_named("sink_recent:share=1.0,recent=5000"))
    found = run(engine, tokenizer, session, FULL, kept, own_answers=True)
    first, second = session.turns[:2]
    said = found["full", TURNS].turns[0].said
    prompt = session.context + first.question
    with torch.inference_mode():
        own: list[int] = []
        while len(own) < TASK.most and "\n" not in tokenizer.decode(own).lstrip():
            own.append(int(engine.model(torch.tensor([prompt + own])).logits[0, -1].argmax()))
    assert tokenizer.decode(own).strip().partition("\n")[0] == said != first.gold
    ended = own if "\n" in tokenizer.decode(own) else own + session.end
    tokens = prompt + ended + second.question + second.answer
    wanted = expected(engine, tokens, second.answer)
    for name in ("full", "kept"):
        assert nats(found[name, TURNS])[1] == pytest.approx(wanted, abs=1e-4)


def test_what_keeps_everything_equals_the_full_cache(
    engine: TransformersEngine, tokenizer: Any, session: Session
) -> None:
    variants = [
        FULL,
        Variant("raw", codec=codec_named("raw")),
        Variant("all", method=method_named("heavy_hitter:share=1.0")),
        Variant("rows", method=method_named("key_norm:share=1.0")),
        Variant("steps", method=method_named("sink_recent:recent=5000")),
        Variant("whole", sight=sight_named("whole")),
        FULL,
    ]
    found = run(engine, tokenizer, session, *variants)
    for mode in MODES:
        for variant in variants[1:]:
            one, full = found[variant.name, mode], found["full", mode]
            assert nats(one) == pytest.approx(nats(full), abs=1e-4)
            assert [turn.said for turn in one.turns] == [turn.said for turn in full.turns]
            assert one.kept_share == 1.0


def test_what_is_stored_with_fewer_rows(engine: TransformersEngine, tokenizer: Any, session: Session) -> None:
    """Complete chunks lose rows after each turn, as they are stored then; other variants beside it have theirs."""
    rows, raw = Variant("rows", method=method_named("key_norm:share=0.5")), Variant("raw", codec=codec_named("raw"))
    found = run(engine, tokenizer, session, FULL, rows, raw)
    for mode in MODES:
        stored, full = nats(found["rows", mode]), nats(found["full", mode])
        assert all(abs(one - other) > 1e-3 for one, other in zip(stored[1:], full[1:], strict=True))
        assert nats(found["raw", mode]) == pytest.approx(full, abs=1e-4)
        assert found["raw", mode].kept_share == 1.0
    length = len(session.context)
    assert found["rows", REQUESTS].kept_share == pytest.approx(1 - length // 64 * 32 / length)


def test_what_forgets_answers_otherwise(engine: TransformersEngine, tokenizer: Any, session: Session) -> None:
    forgets = Variant("forgets", method=method_named("sink_recent:sinks=0,share=0.1"))
    coarse = Variant("coarse", codec=codec_named("kivi:bits=2,window=0"))
    found = run(engine, tokenizer, session, FULL, forgets, coarse)
    for mode in MODES:
        kept, coded, full = (found[name, mode] for name in ("forgets", "coarse", "full"))
        assert kept.kept_share == pytest.approx(0.1, abs=0.01)
        behind = slice(1, None) if mode == TURNS else slice(None)
        for one, other in ((kept, full), (coded, full)):
            assert all(abs(a - b) > 1e-3 for a, b in zip(nats(one)[behind], nats(other)[behind], strict=True))
    context, turn = session.context, session.turns[0]
    window = context[-round(0.1 * len(context)) :]
    assert nats(found["forgets", REQUESTS])[0] == pytest.approx(_windowed(engine, context, window, turn), abs=1e-3)


def _windowed(engine: TransformersEngine, context: list[int], window: list[int], turn: Any) -> float:
    """By the model alone: the context's keys and values, of which only the last are visible to what follows."""
    from transformers import DynamicCache

    tail, first = turn.question + turn.answer, len(context) - len(window)
    with torch.inference_mode():
        cache = DynamicCache()
        engine.model(torch.tensor([context]), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
        positions = torch.arange(len(context), len(context) + len(tail))[None]
        logits = engine.model(
            torch.tensor([tail]), past_key_values=cache, position_ids=positions, attention_mask=None
        ).logits[0, -len(turn.answer) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(turn.answer)[:, None]).mean())


def test_chunks_are_encoded_once(
    engine: TransformersEngine, tokenizer: Any, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []
    transcode = Judge.transcode

    def noting(judge: Judge, cache: Any, first: int, end: int, codec: Any) -> Any:
        ranges.append((first, end - codec.window))
        return transcode(judge, cache, first, end, codec)

    monkeypatch.setattr(Judge, "transcode", noting)
    run(engine, tokenizer, session, Variant("int8", codec=codec_named("int8")))
    context, prompt = len(session.context), len(session.context) + len(session.turns[0].question)
    assert ranges[:2] == [(0, context // 64 * 64), (0, prompt // 64 * 64)]
    later = ranges[1:]
    assert len(later) > 1
    assert all(one[1] == other[0] for one, other in pairwise(later))
