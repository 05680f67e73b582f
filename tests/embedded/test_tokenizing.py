"""Text to tokens, and answers back to text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cakekv.embedded.tokenizing import Tokenizing
from cakekv.errors import BadInput
from cakekv.prompt import Document, Tokenized

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "hi": 4, ":": 5}
MESSAGES = [{"role": "user", "content": "hi"}]


def tokenizer(template: str | None) -> Any:
    """One of words, which puts around a text what the template says."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        special = [(word, WORDS[word]) for word in ("<s>", "</s>")]
        words.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{{bos_token}}{% for m in messages %}{{m['role']}} : {{m['content']}}{% endfor %}"
    return made


@pytest.mark.parametrize(("template", "behind"), [("<s> $A", []), ("<s> $A </s>", [2])])
def test_a_chat_template_s_bos_is_not_repeated(template: str, behind: list[int]) -> None:
    made = tokenizer(template)
    notes: list[str] = []
    text = made.apply_chat_template(MESSAGES, tokenize=False)
    assert Tokenizing(made).tokens(text, notes) == [1, 3, 5, 4, *behind]
    assert len(notes) == 1
    assert "begins with <s>" in notes[0]


@pytest.mark.parametrize(
    ("template", "text", "tokens"),
    [
        ("<s> $A", "user : hi", [1, 3, 5, 4]),
        (None, "<s> hi", [1, 4]),
        (None, "<s> <s> hi", [1, 1, 4]),
        ("<s> $A", "hi <s>", [1, 4, 1]),
    ],
)
def test_what_does_not_repeat_it_stays(template: str | None, text: str, tokens: list[int]) -> None:
    notes: list[str] = []
    assert Tokenizing(tokenizer(template)).tokens(text, notes) == tokens
    assert notes == []


def test_what_a_tokenizer_or_a_chat_template_returns_is_a_prompt() -> None:
    made = tokenizer("<s> $A")
    for tensors in (None, "pt", "np"):
        assert Tokenizing(made).tokens(made("hi", return_tensors=tensors), []) == [1, 4]
        chat = made.apply_chat_template(MESSAGES, return_tensors=tensors)
        assert Tokenizing(made).tokens(chat, []) == [1, 3, 5, 4]


def test_text_that_cannot_be_read() -> None:
    with pytest.raises(BadInput, match="there is no tokenizer"):
        Tokenizing(None).tokens("hi", [])
    with pytest.raises(BadInput, match="surrogate"):
        Tokenizing(tokenizer(None)).tokens("\udcff", [])
    with pytest.raises(BadInput, match="the tokenizer is 'gpt2'"):
        Tokenizing("gpt2")


@pytest.mark.parametrize(
    ("template", "own"), [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A", []), (None, [])], ids=lambda value: str(value)
)
def test_documents_are_cut_into_tokens_by_themselves(template: str | None, own: list[int]) -> None:
    tokenizing = Tokenizing(tokenizer(template))
    assert tokenizing.document(Document("hi user")) == [*own, 4, 3]
    assert tokenizing.document(Document("hi user", bos=False)) == [4, 3]
    assert tokenizing.document(Document("<s> hi")) == [1, 4], "the text has one"
    assert tokenizing.document(Document("")) == []
    assert tokenizing.document(Document([5, 4])) == [5, 4], "token ids are taken as they are"
    notes: list[str] = []
    prompt = tokenizing.prompt(["hi", Document("hi user"), Document(""), "user :", Document([5, 4]), [4]], notes)
    begins = tokenizing.tokens("hi", notes)
    assert prompt.token_ids == [*begins, *own, 4, 3, 3, 5, 5, 4, 4]
    assert [(place.start, place.tokens) for place in prompt.documents] == [
        (len(begins), len(own) + 2),
        (len(begins) + len(own) + 4, 2),
    ]
    assert tokenizing.prompt(Document("hi"), notes).token_ids == [*own, 4]
    assert not notes


def test_a_list_without_a_document_is_a_plain_prompt() -> None:
    tokenizing = Tokenizing(None)
    assert tokenizing.prompt([3, 4], []) == Tokenized([3, 4])
    with pytest.raises(BadInput, match="given by itself"):
        tokenizing.prompt(["hi", "user"], [])
    with pytest.raises(BadInput, match="no tokenizer"):
        tokenizing.prompt([[3], Document("hi")], [])
    with pytest.raises(BadInput, match="element 0"):
        tokenizing.prompt([Document([3]), [Document([4])]], [])
