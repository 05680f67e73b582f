"""What is marked of a prompt, and that a method is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from cakekv import Cake
from cakekv.compress.base import Layer, Marked, Method
from cakekv.errors import BadInput
from cakekv.prompt import Chat, Document, Truncated, marked_in, marked_without
from tests.embedded.chatting import TEMPLATE, talker, tokenizer

TYPES = [0, 1, 1, 0, 2, 2, 3, 0]
IMAGES = [Marked(1, 3, "image"), Marked(4, 6, "video"), Marked(6, 7, "audio")]
MERGED = tokenizer()
ENGINE = talker(MERGED)
SYSTEM, USER, OTHER = (
    {"role": role, "content": said} for role, said in (("system", "a bad cab"), ("user", "abcd ef gh"), ("user", "dad"))
)
SAID = {"role": "assistant", "content": "abcdef"}


@dataclass(frozen=True)
class Noting(Method):
    """Keeps everything, and notes what is marked."""

    name: ClassVar[str] = "noting"
    told: ClassVar[list[Sequence[Marked]]] = []

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        self.told.append(layers[0].marked)
        return [None] * len(layers)


def told(prompt: Any, made: Any = MERGED) -> Sequence[Marked]:
    """What a method is told of a prompt."""
    with Cake(ENGINE, made, None, compress=Noting()) as cake:
        cake.prefill(prompt)
    return Noting.told.pop()


@pytest.mark.parametrize("name", ["mm_token_type_ids", "token_type_ids"])
@pytest.mark.parametrize(
    "form",
    [list, lambda types: [types], lambda types: np.array([types]), torch.tensor],
    ids=["flat", "row", "numpy", "torch"],
)
def test_images_of_a_processor(name: str, form: Any) -> None:
    given = {"input_ids": list(range(8)), name: form(TYPES)}
    assert marked_in(given) == IMAGES
    assert marked_in(given, 100) == [Marked(start + 100, end + 100, what) for start, end, what in IMAGES]


def test_padding_does_not_count() -> None:
    encoding = BatchEncoding(
        {
            "input_ids": [[0, 0, *range(8), 0]],
            "attention_mask": [[0, 0, *[1] * 8, 0]],
            "token_type_ids": [[7, 7, *TYPES, 7]],
        }
    )
    assert marked_in(encoding) == IMAGES


@pytest.mark.parametrize("prompt", ["text", [1, 2], {"input_ids": [1, 2]}, {"input_ids": [1], "token_type_ids": None}])
def test_of_other_prompts_nothing_is_marked(prompt: Any) -> None:
    assert marked_in(prompt) == []


def test_types_of_another_length_are_refused() -> None:
    with pytest.raises(BadInput, match="token_type_ids has 2 entries for 3 tokens"):
        marked_in({"input_ids": [1, 2, 3], "token_type_ids": [0, 1]})


@pytest.mark.parametrize(
    ("dropped", "left"),
    [
        (range(4), [Marked(6, 16, "image")]),
        (range(8, 12), [Marked(8, 16, "image")]),
        (range(12, 14), [Marked(10, 18, "image")]),
        (range(15, 30), [Marked(10, 15, "image")]),
        (range(20, 30), [Marked(10, 20, "image")]),
        (range(5, 25), []),
    ],
)
def test_marks_move_with_what_is_left(dropped: range, left: list[Marked]) -> None:
    assert marked_without([Marked(10, 20, "image")], dropped) == left


def test_a_method_is_told_of_images_and_of_the_question_behind_them() -> None:
    given = {"input_ids": list(range(8)), "mm_token_type_ids": TYPES}
    assert list(told(given)) == [*IMAGES, Marked(7, 8, "question")]
    assert list(told(Truncated(given, range(1, 4)))) == [
        Marked(1, 3, "video"), Marked(3, 4, "audio"), Marked(4, 5, "question")
    ]  # fmt: skip


def test_the_question_follows_the_last_document() -> None:
    given = {"input_ids": list(range(8)), "mm_token_type_ids": TYPES}
    assert list(told([Document([1] * 20), "ab a"])) == [Marked(20, 20 + len(MERGED("ab a")["input_ids"]), "question")]
    images = [Marked(start + 2, end + 2, what) for start, end, what in IMAGES]
    assert list(told([[1, 2], Document(given), [3] * 5])) == [*images, Marked(10, 15, "question")]
    assert list(told([Document([1] * 20), Document([2] * 20)])) == []
    assert list(told([1] * 20)) == []


def asked(prompt: list[int], marked: Sequence[Marked]) -> str:
    """What the question says."""
    (mark,) = marked
    assert mark.what == "question"
    return str(MERGED.decode(prompt[mark.start : mark.end]))


def test_the_question_of_a_chat_is_the_last_message_of_its_user() -> None:
    chat = Chat([SYSTEM, USER, SAID, OTHER])
    with Cake(ENGINE, MERGED, None, compress=Noting()) as cake:
        prompt = cake.prefill(chat).token_ids
    assert asked(prompt, Noting.told.pop()) == "<user>dad<end><assistant>"
    (mark,) = told(Truncated(chat, range(3, 7)))
    assert mark.end == len(prompt) - 4
    assert asked(prompt[:3] + prompt[7:], [mark]) == "<user>dad<end><assistant>"
    assert list(told(Truncated(chat, range(len(prompt) - 3, len(prompt) - 1)))) == []


def test_so_it_is_once_answers_have_their_own_tokens() -> None:
    with Cake(ENGINE, MERGED, None, compress=Noting()) as cake:
        session = cake.session([SYSTEM])
        for said in ("abcd ef", "cab"):
            session.send(said, max_new_tokens=9, temperature=2.0, seed=3)
        Noting.told.clear()
        prompt = cake.prefill(Chat([*session.messages, OTHER])).token_ids
    assert asked(prompt, Noting.told.pop()) == "<user>dad<end><assistant>"


def test_a_chat_whose_messages_cannot_be_told_apart_has_no_question() -> None:
    refuses = "{% if messages[-1].role != 'user' %}{{ raise_exception('ends so') }}{% endif %}"
    assert list(told(Chat([SYSTEM, USER, SAID, OTHER]), tokenizer(template=refuses + TEMPLATE))) == []
    counts = TEMPLATE.replace("{% for m", "{{ messages|length }}{% for m").replace(
        "{{ messages|length }}", "{{ 'abcdefgh'[messages|length] }}"
    )
    assert list(told(Chat([SYSTEM, USER, SAID, OTHER]), tokenizer(template=counts))) == []
    assert list(told(Chat([USER]))) == []
