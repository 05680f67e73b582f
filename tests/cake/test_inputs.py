"""What a `Cake` is given: refused with what to give instead, or taken as what it can only mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from tests.matrix.models import build, tiny

NAN = float("nan")


@pytest.fixture(scope="module")
def small() -> TransformersEngine:
    return TransformersEngine(build("llama"))


@pytest.fixture(scope="module")
def cake(small: TransformersEngine) -> Cake:
    return Cake(small, chunk_tokens=8)


@pytest.mark.parametrize("method", ["prefill", "generate", "plan"])
@pytest.mark.parametrize(
    "prompt", [None, 5, b"abc", [1.5], [True], ["1"], {1, 2}, [[1], [2]], [2**70], [-1], [128], []]
)
def test_what_is_no_prompt_is_refused_by_every_method(cake: Cake, method: str, prompt: Any) -> None:
    with pytest.raises(BadInput, match=r"prompt|token id"):
        getattr(cake, method)(prompt)


def test_one_sequence_is_the_same_prompt_in_any_form(cake: Cake) -> None:
    expected = cake.generate([5, 6, 7], max_new_tokens=4).token_ids
    encoding = transformers.BatchEncoding({"input_ids": [[0, 5, 6, 7]], "attention_mask": [[0, 1, 1, 1]]})
    for prompt in (torch.tensor([[5, 6, 7]]), np.array([5, 6, 7]), encoding):
        assert cake.generate(prompt, max_new_tokens=4).token_ids == expected


@pytest.mark.parametrize(
    "options",
    [
        *({"max_new_tokens": value} for value in (0, -1, 1.5, 1e20, True, "3", None, NAN)),
        *({"temperature": value} for value in (-1, NAN, float("inf"), "1", None, True)),
        *({"top_k": value} for value in (0, 2.5, "3", True)),
        *({"top_p": value} for value in (0, 1.5, NAN, "1", True)),
        *({"seed": value} for value in (2**70, 1.5, "1", True)),
        *({"mode": value} for value in (None, "fast", list[Any]())),
        *({"save": value} for value in (None, "no", 0)),
        {"on_progress": 5},
    ],
    ids=str,
)
def test_options_of_a_request(cake: Cake, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        cake.generate([5, 6, 7], **options)


def test_an_answer_is_no_longer_than_the_context(cake: Cake) -> None:
    engine = cake.engine
    answer = cake.generate([5] * 250, max_new_tokens=10**20).token_ids
    assert len(answer) <= engine.max_context - 250 + 1
    numbers: dict[str, Any] = {"max_new_tokens": np.int64(3), "temperature": 1, "top_k": np.int32(5), "seed": -1}
    assert cake.generate([5, 6, 7], **numbers).token_ids


@pytest.mark.parametrize("room", [-1, 1.5, True, "3", None, NAN])
def test_room(cake: Cake, room: Any) -> None:
    with pytest.raises(BadInput, match="room"):
        cake.prefill([5, 6, 7], room=room)
    with pytest.raises(BadInput, match="the model's context"):
        cake.prefill([5, 6, 7], room=10**20)


@pytest.mark.parametrize("tokens", [10**11, 10**16, 10**20])
def test_where_positions_have_no_end_memory_has(tokens: int) -> None:
    engine = TransformersEngine(tiny(transformers.BloomConfig(**{"vocab_size": 128, "hidden_size": 32, "n_head": 4})))
    cake = Cake(engine, chunk_tokens=8)
    with pytest.raises(BadInput, match=r"no memory for a KV cache of .*fewer new tokens"):
        cake.generate([5, 6, 7], max_new_tokens=tokens)
    with pytest.raises(BadInput, match=r"no memory for a KV cache|the model's context"):
        cake.prefill([5, 6, 7], room=tokens)


@pytest.mark.parametrize(
    "options",
    [
        *({"chunk_tokens": value} for value in ("64", True, 1e20, 10**20, NAN, None, 2.5, 0, -1)),
        *({"max_span_tokens": value} for value in ("64", True, 1e20, 10**20, NAN, None, 8)),
        *({"tenant": value} for value in (5, None, b"a", "\udcff")),
        *({"codec": value} for value in (5, None, "nope", "")),
        *({"policy": value} for value in (5, None, "nope")),
        *({"layered_finish": value} for value in (1, None, "no")),
        *({"deadline_s": value} for value in ("5", None, True, NAN, 0)),
        *({"ttft_target_s": value} for value in ("5", None, True, NAN, -1)),
        *({"quality_floor": value} for value in ("5", None, True, NAN, 0, 1.0)),
        *({"calibration": value} for value in (5, True)),
        *({"metrics": value} for value in (True, "prometheus", object)),
        *({"store": value} for value in (5, b"memory://", [5], [None], True, {"memory://"})),
        *({"tokenizer": value} for value in ("gpt2", 5)),
    ],
    ids=str,
)
def test_options_of_a_cake(small: TransformersEngine, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        Cake(small, **options)


def test_a_secret_is_not_in_the_refusal(small: TransformersEngine) -> None:
    for options in ({"tenant": b"hunter2"}, {"store": [b"redis://:hunter2@host"]}, {"tenant": "hunter2\udcff"}):
        with pytest.raises(BadInput) as refused:
            Cake(small, **options)
        assert "hunter2" not in str(refused.value)


def test_a_model_is_no_engine(small: TransformersEngine) -> None:
    with pytest.raises(BadInput, match=r"the engine is of type LlamaForCausalLM: give TransformersEngine\(model\)"):
        Cake(small.model)


def test_a_store_may_be_a_path_and_numbers_of_any_integer_type(small: TransformersEngine, tmp_path: Path) -> None:
    for _ in range(2):
        with Cake(small, store=tmp_path / "kv", chunk_tokens=np.int64(8), max_span_tokens=np.int32(16)) as cake:  # type: ignore[arg-type]
            loaded = cake.prefill([5] * 40, mode="load").report.loaded_tokens
            cake.wait_saved()
    assert loaded == 39
