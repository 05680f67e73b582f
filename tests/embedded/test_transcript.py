"""Chats to tokens: what was generated keeps its tokens, and what was not is cut as ever."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakekv.embedded.chat_template import ChatTemplate
from cakekv.embedded.transcript import Transcript
from cakekv.prompt import Chat
from tests.embedded.chatting import LETTERS, SPECIAL, STRIPPING, tokenizer

USER = {"role": "user", "content": "abcd ef"}
NEXT = {"role": "user", "content": "ga"}
MERGED = tokenizer()


def transcript(made: Any = MERGED, **options: Any) -> Transcript:
    return Transcript(ChatTemplate(made, threading.Lock()), **options)


def canonical(messages: list[dict[str, str]], made: Any = MERGED) -> list[int]:
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in made(text, add_special_tokens=False)["input_ids"]]


def answer(*words: str) -> tuple[list[int], dict[str, str]]:
    return MERGED.convert_tokens_to_ids(list(words)), {"role": "assistant", "content": "".join(words)}


def test_a_chat_that_nobody_knows_is_cut_as_the_template_has_it() -> None:
    notes: list[str] = []
    messages = [USER, answer("a", "b")[1], NEXT]
    assert transcript().prompt(Chat(messages), notes).token_ids == canonical(messages)
    assert notes == []


def test_an_answer_keeps_its_tokens() -> None:
    known, notes = transcript(), list[str]()
    first = known.prompt(Chat([USER]), notes)
    tokens, said = answer("a", "b", "c", "d", "e", "f")
    known.answered(first, tokens)
    second = known.prompt(Chat([USER, said, NEXT]), notes)
    whole = canonical([USER, said, NEXT])
    assert second.token_ids == [*first.token_ids, *tokens, *whole[-5:]]
    assert len(second.token_ids) > len(whole)
    more, again = answer("c", "d")
    known.answered(second, more)
    third = known.prompt(Chat([USER, said, NEXT, again, NEXT]), notes)
    assert third.token_ids[: len(second.token_ids) + 2] == second.token_ids + more
    assert known.prompt(Chat([USER, said, NEXT]), notes) == second
    assert notes == []


def test_of_several_answers_the_one_that_was_given() -> None:
    known = transcript()
    first = known.prompt(Chat([USER]), [])
    ways = [answer("ab", "c", "d"), answer("a", "b", "cd"), answer("a", "b", "a")]
    for tokens, _ in ways:
        known.answered(first, tokens)
    for tokens, said in ways[1:]:
        assert known.prompt(Chat([USER, said, NEXT]), []).token_ids[len(first.token_ids) :][: len(tokens)] == tokens


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_template_that_leaves_something_out_is_followed_and_it_is_said(kept: int) -> None:
    words = ["e", "f", "g", "h", "a", "b"]
    made = tokenizer(template=STRIPPING.replace("m.content[8:]", f"m.content[:{kept}] + m.content[4:]"))
    known, notes = transcript(made), list[str]()
    first = known.prompt(Chat([USER]), notes)
    tokens, said = answer(*words)
    known.answered(first, tokens)
    second = known.prompt(Chat([USER, said, NEXT]), notes)
    assert len(notes) == 1
    assert "6 tokens" in notes[0]
    assert made.decode(second.token_ids) == made.decode(canonical([USER, said, NEXT], made))
    rest = canonical([USER, said, NEXT], made)[len(first.token_ids) :]
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    assert second.token_ids[-len(rest) :][-6:] == rest[-6:]


def test_an_answer_that_somebody_has_made_longer() -> None:
    known = transcript()
    first = known.prompt(Chat([USER]), [])
    tokens, _ = answer("a", "b")
    known.answered(first, tokens)
    longer = {"role": "assistant", "content": "ab gh"}
    got = known.prompt(Chat([USER, longer, NEXT]), []).token_ids
    assert got[: len(first.token_ids) + 2] == first.token_ids + tokens
    assert MERGED.decode(got) == MERGED.decode(canonical([USER, longer, NEXT]))


def test_tools_and_the_template_s_options_are_part_of_the_chat() -> None:
    known = transcript()
    plain = known.prompt(Chat([USER]), [])
    known.answered(plain, answer("a", "b")[0])
    with_tools = known.prompt(Chat([USER], [{"name": "abcd"}]), [])
    assert with_tools.token_ids != plain.token_ids
    assert MERGED.decode(with_tools.token_ids).startswith("<s><tool>abcd <end>")
    without = known.prompt(Chat([USER], template={"add_generation_prompt": False}), [])
    assert without.token_ids == plain.token_ids[:-1]


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    known = transcript(most_tokens=300)
    tokens, said = answer("a", "b", "c", "d")
    users = [
        {"role": "user", "content": "".join(random.Random(number).choices("abcdefghij", k=9))} for number in range(40)
    ]
    for user in users:
        known.answered(known.prompt(Chat([user]), []), tokens)
    kept = [known.prompt(Chat([user, said, NEXT]), []).token_ids != canonical([user, said, NEXT]) for user in users]
    assert kept == sorted(kept)
    assert 5 < sum(kept) < 30


def test_a_tokenizer_that_does_not_tell_where_tokens_are() -> None:
    class Slow:
        is_fast = False
        chat_template = MERGED.chat_template
        apply_chat_template = MERGED.apply_chat_template
        decode = MERGED.decode

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return MERGED(text, add_special_tokens=add_special_tokens)

    known = transcript(Slow())
    first = known.prompt(Chat([USER]), [])
    tokens, said = answer("a", "b", "c", "d")
    known.answered(first, tokens)
    whole = [*first.token_ids, *tokens, *canonical([USER, said, NEXT])[-5:]]
    assert known.prompt(Chat([USER, said, NEXT]), []).token_ids == whole


letters = st.text(LETTERS, max_size=12)


@given(st.lists(st.tuples(letters, letters, st.booleans()), min_size=1, max_size=5), st.randoms())
def test_whatever_is_said_the_tokens_write_the_chat(turns: list[tuple[str, str, bool]], rng: random.Random) -> None:
    """Answers come in random pieces, and some are changed before they come back."""
    known, messages = transcript(), list[dict[str, str]]()
    for said, answered, is_changed in turns:
        messages.append({"role": "user", "content": said})
        prompt = known.prompt(Chat(messages), [])
        text = MERGED.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert MERGED.decode(prompt.token_ids) == text
        tokens: list[int] = []
        for letter in answered:
            tokens += MERGED(letter, add_special_tokens=False)["input_ids"]
        known.answered(prompt, tokens)
        content = answered[: rng.randrange(13)] + "j" if is_changed else answered
        messages.append({"role": "assistant", "content": content})
    assert not {*SPECIAL} & {content for _, content, _ in turns}
