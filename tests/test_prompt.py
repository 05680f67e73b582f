"""What may be given as a prompt."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from cakekv.errors import BadInput
from cakekv.prompt import check_text, token_ids

TOKENS = [3, 1, 4]


@pytest.mark.parametrize(
    "prompt",
    [
        TOKENS,
        tuple(TOKENS),
        deque(TOKENS),
        array("i", TOKENS),
        np.array(TOKENS),
        np.array([TOKENS], dtype=np.uint16),
        list(np.array(TOKENS)),
        torch.tensor(TOKENS),
        torch.tensor([TOKENS], dtype=torch.int32),
        list(torch.tensor(TOKENS)),
        [TOKENS],
        [torch.tensor(TOKENS)],
        {"input_ids": TOKENS},
        BatchEncoding({"input_ids": [TOKENS], "attention_mask": [[1, 1, 1]], "token_type_ids": [[0, 0, 0]]}),
        BatchEncoding({"input_ids": [[0, *TOKENS]], "attention_mask": [[0, 1, 1, 1]]}, tensor_type="pt"),
        BatchEncoding({"input_ids": [*TOKENS, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}, tensor_type="np"),
        {"input_ids": torch.tensor([TOKENS]), "attention_mask": None},
    ],
)
def test_one_sequence_of_integers_is_taken(prompt: Any) -> None:
    tokens = token_ids(prompt)
    assert tokens == TOKENS
    assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize("prompt", [[], (), np.array([], dtype=int), {"input_ids": [7], "attention_mask": [0]}])
def test_nothing_is_for_the_engine_to_refuse(prompt: Any) -> None:
    assert token_ids(prompt) == []


@pytest.mark.parametrize(
    ("prompt", "advice"),
    [
        (None, "a text or a flat sequence of token ids, not None"),
        (5, "not 5 of type int"),
        (torch.tensor(5), r"not tensor\(5\)"),
        (b"text", "decode"),
        (bytearray(b"text"), "decode"),
        (memoryview(b"text"), "decode"),
        ([b"text"], "of type bytes"),
        ([1.0, 2.0], "element 0 is 1.0 of type float: token ids are integers"),
        ([1, 2.5], "element 1 is 2.5"),
        (np.array([1.0, 2.0]), "of type float"),
        (torch.tensor([[1.5, 2.5]]), "of type float"),
        ([float("nan")], "element 0 is nan"),
        ([True, False], "element 0 is True of type bool"),
        (np.array([True]), "of type bool"),
        (torch.tensor([True]), "of type bool"),
        ([1, None], "element 1 is None"),
        (["1", "2"], "a text is given by itself"),
        (np.array(["1", "2"]), "a text is given by itself"),
        ({1, 2}, "no order"),
        (frozenset([1]), "no order"),
        ((token for token in TOKENS), r"give list\(prompt\)"),
        (iter(TOKENS), r"give list\(prompt\)"),
        ([TOKENS, TOKENS], "a batch of 2"),
        (torch.tensor([TOKENS, TOKENS]), "a batch of 2"),
        (torch.tensor([[3], [1], [4]]), "a batch of 3"),
        (torch.tensor([[TOKENS]]), "nested"),
        ([TOKENS, 5], "nested"),
        ({"input_ids": [TOKENS, TOKENS]}, "a batch of 2"),
        ([2**70], "more than 64 bits"),
        ({"role": "user", "content": "hi"}, "apply_chat_template"),
        ([{"role": "user", "content": "hi"}], "apply_chat_template"),
        ([[{"role": "user", "content": "hi"}]], "apply_chat_template"),
        ({"prompt": "hi"}, "a mapping with 'prompt'.*'input_ids'"),
        ({"input_ids": TOKENS, "pixel_values": [0.5]}, "it has pixel_values"),
        ({"input_ids": TOKENS, "attention_mask": [1, 0, 1]}, "attention_mask"),
        ({"input_ids": TOKENS, "attention_mask": [1, 1]}, "attention_mask has 2 entries for 3 tokens"),
    ],
)
def test_all_else_is_refused_with_what_to_give(prompt: Any, advice: str) -> None:
    with pytest.raises(BadInput, match=advice):
        token_ids(prompt)


def test_half_a_surrogate_pair_is_no_text() -> None:
    check_text("héllo 😀", "the prompt")
    with pytest.raises(BadInput, match="the prompt is no text: its character 3 is half of a surrogate pair"):
        check_text("abc\udcff", "the prompt")
