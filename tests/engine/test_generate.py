"""transformers' own `generate` over a restored cache answers as it does without one."""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from cakekv import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.engine.versions import cache_arguments
from cakekv.errors import BadInput
from tests.matrix.models import CONFIGS, VOCABULARY, build

EOS = 2
NEW = 12
# MPT's generate uses no cache unless it is told to, whether it is given one or not.
NAMES = [name for name in CONFIGS if name != "mpt"]
WINDOWED = ["mistral", "gemma3", "gemma3n", "gpt-oss", "llama4"]


class Halves(LogitsProcessor):  # type: ignore[misc]
    """Rules out a third of all tokens; which, depends on the token before."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ruled_out = (torch.arange(scores.shape[1]) + input_ids[:, -1:]) % 3 == 0
        return scores.masked_fill(ruled_out, -float("inf"))


class Json(LogitsProcessor):  # type: ignore[misc]
    """Lets an answer be JSON of one form only; a token is a character of ASCII."""

    FORM = (*'{"name": "', *[string.ascii_letters] * 5, *'", "age": ', "123456789", string.digits, "}", chr(EOS))

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = [ord(character) for character in self.FORM[input_ids.shape[1] - self.prompt_tokens]]
        constrained = torch.full_like(scores, -float("inf"))
        constrained[:, allowed] = scores[:, allowed]
        return constrained


class Restored:
    """A model, and a prompt of which all but the end comes from a store."""

    def __init__(self, name: str) -> None:
        self.model = build(name)
        self.cake = Cake(TransformersEngine(self.model), None, "memory://", chunk_tokens=8, max_span_tokens=16)
        self.ids = torch.randint(3, VOCABULARY, (1, 85), generator=torch.Generator().manual_seed(3))
        self.cake.prefill(self.ids[:, :70])
        self.cake.wait_saved()
        (self.argument,) = cache_arguments(self.model.forward)

    def prefill(self, tokens: int, **options: Any) -> Any:
        prefill = self.cake.prefill(self.ids[:, :tokens], mode="load", **options)
        assert prefill.report.loaded_tokens >= 64
        return prefill

    def generate(self, ids: torch.Tensor, cache: Any = None, **options: Any) -> list[list[int]]:
        """The new tokens."""
        torch.manual_seed(0)
        given = {} if cache is None else {self.argument: cache}
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | given | options
        return self.model.generate(ids, **options)[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module", params=NAMES)
def any_model(request: pytest.FixtureRequest) -> Iterator[Restored]:
    restored = Restored(request.param)
    yield restored
    restored.cake.close()


@pytest.fixture(scope="module", params=["llama", "gemma3", "deepseek-v3"])
def restored(request: pytest.FixtureRequest) -> Iterator[Restored]:
    restored = Restored(request.param)
    yield restored
    restored.cake.close()


@pytest.mark.parametrize("tokens", [72, 85])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_greedy_and_beams(any_model: Restored, tokens: int, options: dict[str, Any]) -> None:
    cache = any_model.prefill(tokens).dynamic_cache()
    assert cache.get_seq_length() == tokens - 1
    assert any_model.generate(any_model.ids, cache, **options) == any_model.generate(any_model.ids, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [Halves()]},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "num_beams": 2},
        {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_processors_and_sampling(restored: Restored, options: dict[str, Any]) -> None:
    cache = restored.prefill(72).dynamic_cache()
    assert restored.generate(restored.ids, cache, **options) == restored.generate(restored.ids, **options)


@pytest.mark.parametrize("beams", [1, 2])
def test_json_mode(restored: Restored, beams: int) -> None:
    options = {
        "logits_processor": [Json(restored.ids.shape[1])],
        "num_beams": beams,
        "eos_token_id": EOS,
        "max_new_tokens": 40,
    }
    (answer,) = restored.generate(restored.ids, restored.prefill(85).dynamic_cache(), **options)
    assert [answer] == restored.generate(restored.ids, **options)
    said = json.loads("".join(map(chr, answer[:-1])))
    assert len(said["name"]) == 5
    assert 10 <= said["age"] <= 99


@pytest.mark.parametrize("with_room", [False, True])
@pytest.mark.parametrize("assistant", [False, True])
@pytest.mark.parametrize("name", ["llama", *WINDOWED])
def test_assisted_decoding_is_given_what_the_cache_has_not(name: str, assistant: bool, with_room: bool) -> None:
    restored = Restored(name)
    ids, options = restored.ids, {"assistant_model": build(name)} if assistant else {"prompt_lookup_num_tokens": 3}

    def cache() -> Any:
        return restored.prefill(72, room=100).cache if with_room else restored.prefill(73).dynamic_cache()

    answer = restored.generate(ids[:, 72:], cache(), attention_mask=torch.ones_like(ids), **options)
    assert answer == restored.generate(ids)
    with pytest.raises(BadInput, match=r"give it the others, input_ids\[:, 72:\]"):
        restored.generate(ids, cache(), **options)
    restored.cake.close()


def test_one_prefix_for_a_batch_of_prompts(restored: Restored) -> None:
    questions = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    batch = torch.cat([restored.ids.repeat(3, 1), questions], dim=1)
    cache = restored.prefill(85).dynamic_cache(85)
    assert restored.generate(batch, cache) == restored.generate(batch)


def test_the_cache_itself_where_there_is_room(restored: Restored) -> None:
    expected = restored.generate(restored.ids)
    prefill = restored.prefill(84, room=1 + NEW)
    assert restored.generate(restored.ids, copy.deepcopy(prefill.cache)) == expected
    assert restored.generate(restored.ids, prefill.cache) == expected
    with pytest.raises(BadInput, match=r"one sequence, not 2.*dynamic_cache"):
        restored.generate(restored.ids, restored.prefill(84, room=1 + NEW).cache, num_beams=2)


@pytest.mark.parametrize(("tokens", "more"), [(84, 1), (72, 13), (85, 85)])
def test_a_cache_without_room_never_loses_a_token_in_silence(restored: Restored, tokens: int, more: int) -> None:
    with pytest.raises(BadInput, match=f"room for {tokens} tokens: {more} more do not fit"):
        restored.generate(restored.ids, restored.prefill(tokens).cache)


def test_decoding_by_hand(restored: Restored) -> None:
    (expected,) = restored.generate(restored.ids)
    prefill = restored.prefill(85, room=NEW)
    for cache in (prefill.cache, prefill.dynamic_cache(85)):
        logits, answer = prefill.logits, []
        for _ in range(NEW):
            answer.append(int(logits.argmax()))
            with torch.no_grad():
                output = restored.model(torch.tensor([answer[-1:]]), use_cache=True, **{restored.argument: cache})
            logits = output.logits[0, -1]
        assert answer == expected
    answer, logits, engine = [], prefill.logits, restored.cake.engine
    for position in range(85, 85 + NEW):
        answer.append(int(logits.argmax()))
        logits = engine.compute(prefill.cache, answer[-1:], position)
    assert answer == expected
    with pytest.raises(BadInput, match="does not fit"):
        engine.compute(prefill.cache, [3], 85 + NEW)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_cannot_be_cut_to_where_nothing_was_loaded(name: str) -> None:
    restored = Restored(name)
    prefill = restored.prefill(85)
    assert prefill.dynamic_cache(84).get_seq_length() == 84
    with pytest.raises(BadInput, match=r"cannot be cut to 40.*Use Cake.prefill\(token_ids\[:40\]\)"):
        prefill.dynamic_cache(40)
    for wrong in (-1, 86, True, 1.5):
        with pytest.raises(BadInput, match="tokens must be a whole number from 0 to 85"):
            prefill.dynamic_cache(wrong)
    restored.cake.close()


def test_without_windows_it_can_be_cut_anywhere() -> None:
    restored = Restored("llama")
    prefill = restored.prefill(85)
    for tokens in (0, 1, 40, 84):
        assert restored.generate(restored.ids, prefill.dynamic_cache(tokens)) == restored.generate(restored.ids)
    restored.cake.close()
