"""What an answer is asked for: stop texts, penalties, probabilities; and for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from cakekv import BadInput, Cake, Chat
from tests.embedded.chatting import talker, tokenizer

PROMPT = "abcdefgh " * 4


@pytest.fixture
def cake(tmp_path: Path) -> Iterator[Cake]:
    made = tokenizer()
    with Cake(talker(made), made, tmp_path, chunk_tokens=8) as cake:
        yield cake


def test_stop_texts_end_answers_streamed_or_not_wherever_they_are_cut_into_tokens(cake: Cake) -> None:
    whole = cake.generate(PROMPT, max_new_tokens=40)
    assert whole.finish_reason == "length"
    for size in (1, 2, 5):
        stop = whole.text[12 : 12 + size]
        cut = cake.generate(PROMPT, max_new_tokens=40, stop=["never said", stop])
        assert cut.text == whole.text[: whole.text.find(stop)]
        assert cut.finish_reason == "stop"
        assert cut.text.startswith(cake.tokenizer.decode(cut.token_ids))
        assert "".join(cake.stream(PROMPT, max_new_tokens=40, stop=stop)) == cut.text


def test_a_stopped_answer_is_saved_without_what_follows_it(cake: Cake) -> None:
    whole = cake.generate(PROMPT, max_new_tokens=30, save=False)
    cut = cake.generate(PROMPT, max_new_tokens=30, stop=whole.text[14:18])
    cake.wait_saved()
    prompt = cake.tokenizer(PROMPT)["input_ids"] + cut.token_ids
    again = cake.prefill([*prompt, 1, 2, 3], mode="load")
    assert again.report.loaded_tokens >= len(prompt) - 1
    fresh = Cake(cake.engine, cake.tokenizer).prefill([*prompt, 1, 2, 3])
    torch.testing.assert_close(again.logits, fresh.logits, atol=1e-4, rtol=1e-4)


def test_probabilities_are_those_of_the_model(cake: Cake) -> None:
    said = cake.generate(PROMPT, max_new_tokens=3, logprobs=2, repetition_penalty=1.3)
    assert said.logprobs is not None
    tokens = cake.tokenizer(PROMPT)["input_ids"]
    for choice, token in zip(said.logprobs, said.token_ids, strict=True):
        expected = cake.engine.model(torch.tensor([tokens])).logits[0, -1].log_softmax(0)  # type: ignore[attr-defined]
        assert choice.token == token
        assert choice.logprob == pytest.approx(expected[token].item(), abs=1e-3)
        assert [value for _, value in choice.top] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-3)
        tokens = [*tokens, token]
    assert cake.generate(PROMPT, max_new_tokens=3).logprobs is None


def test_penalties(cake: Cake) -> None:
    tokens = cake.tokenizer(PROMPT)["input_ids"]
    inputs = torch.tensor([tokens])
    theirs = cake.engine.model.generate(  # type: ignore[attr-defined]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]),
    )[0, len(tokens) :].tolist()
    assert cake.generate(PROMPT, max_new_tokens=12, repetition_penalty=1.5).token_ids == theirs

    def repeated(**options: float) -> int:
        said = cake.generate(PROMPT, max_new_tokens=16, **options).token_ids  # type: ignore[arg-type]
        return len(said) - len(set(said))

    assert repeated(presence_penalty=100.0) == 0 == repeated(frequency_penalty=100.0)
    assert repeated(frequency_penalty=-100.0) == 15


def test_min_p_leaves_the_likely(cake: Cake) -> None:
    greedy = cake.generate(PROMPT, max_new_tokens=8).token_ids
    assert cake.generate(PROMPT, max_new_tokens=8, temperature=3.0, min_p=1.0, seed=1).token_ids == greedy
    assert cake.generate(PROMPT, max_new_tokens=8, temperature=3.0, seed=1).token_ids != greedy


def test_what_the_makers_propose_is_followed_where_that_is_asked_for(cake: Cake) -> None:
    assert cake.engine.proposed_sampling == {}
    settings = cake.engine.model.generation_config  # type: ignore[attr-defined]
    settings.do_sample, settings.temperature, settings.top_p, settings.repetition_penalty = True, 0.6, 0.9, 1.1
    proposed = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    assert {name: cake.engine.proposed_sampling[name] for name in proposed} == proposed
    assert cake.generate(PROMPT, seed=3).token_ids == cake.generate(PROMPT).token_ids
    sampled = [cake.generate(PROMPT, seed=seed, **cake.engine.proposed_sampling).token_ids for seed in (3, 3, 4)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"stop": ""}, "stop text is empty"),
        ({"stop": 3}, "stop must be a text"),
        ({"stop": ["a", None]}, "stop must be a text"),
        ({"stop": "\udcff"}, "surrogate"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"tenant": 5}, "tenant"),
    ],
)
def test_settings_that_cannot_be(cake: Cake, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        cake.generate(PROMPT, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="stop texts need a tokenizer"):
        Cake(cake.engine).generate([1, 2, 3], stop="a")


def test_a_tenant_has_chunks_and_answers_of_its_own(cake: Cake) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    for tenant in (None, "ann", "bob"):
        said = cake.generate(Chat(chat), max_new_tokens=12, tenant=tenant)
        cake.wait_saved()
        assert said.cached_tokens == 0
        longer = [*chat, {"role": "assistant", "content": said.text[:5]}, {"role": "user", "content": "a"}]
        stranger = cake.generate(Chat(longer), tenant="eve", save=False, mode="load")
        assert stranger.cached_tokens == 0
        assert not any("answer" in note for note in stranger.report.notes)
        assert cake.generate(Chat(longer), tenant=tenant, save=False, mode="load").cached_tokens > 0

    async def streamed() -> str:
        return "".join([piece async for piece in cake.astream(Chat(chat), max_new_tokens=12, tenant="ann")])

    assert asyncio.run(streamed()) == said.text
    with Cake(cake.engine, cake.tokenizer, cake.tiers[0], chunk_tokens=8, tenant="ann") as own:
        assert own.generate(Chat(chat), max_new_tokens=12, mode="load").cached_tokens > 0
