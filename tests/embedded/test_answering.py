from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cakekv.embedded.answering import Answering, Piece
from cakekv.engine.choice import Choice


def utf8(tokens: Sequence[int]) -> str:
    """Text of tokens that are the bytes of UTF-8."""
    return bytes(tokens).decode(errors="replace")


def answer(tokens: bytes, stops: Sequence[str] = ()) -> tuple[list[Piece], int]:
    """The pieces of an answer, and after how many tokens it stopped."""
    answering, pieces = Answering(utf8, stops), []
    for token in tokens:
        pieces.append(answering.add(Choice(token)))
        if answering.stopped:
            break
    return [*pieces, answering.end("length")], len(pieces)


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [choice.token for piece in pieces for choice in piece.choices]


@given(st.binary(max_size=12) | st.text(max_size=200).map(str.encode) | st.just("ab€".encode()[:-1]))
def test_pieces_make_up_the_text_whatever_the_tokens_end_in(tokens: bytes) -> None:
    pieces, _ = answer(tokens)
    assert text(pieces) == utf8(tokens)
    assert tokens_of(pieces) == list(tokens)


def test_pieces_are_whole_characters_as_soon_as_they_are_there() -> None:
    pieces, _ = answer("a€b".encode())
    assert [piece.text for piece in pieces] == ["a", "", "", "€", "b", ""]
    assert [len(piece.choices) for piece in pieces] == [1, 0, 0, 3, 1, 0]


@given(st.text("aab€ ", max_size=100), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3))
def test_an_answer_ends_before_the_first_stop_text(said: str, stops: list[str]) -> None:
    ends = [at for stop in stops if (at := said.find(stop)) >= 0]
    pieces, number = answer(said.encode(), stops)
    # The stop text that is complete first ends the answer; one that began earlier, but is longer, never is.
    first = min((said.find(stop) + len(stop) for stop in stops if stop in said), default=len(said))
    cut = min((at for stop in stops if (at := said[:first].find(stop)) >= 0), default=len(said))
    assert text(pieces) == said[:cut]
    assert bytes(tokens_of(pieces)) == said[:cut].encode()
    assert pieces[-1].finish_reason == ("stop" if ends else "length")
    assert number == len(said[:first].encode())


def test_what_may_become_a_stop_text_is_held_back_until_it_is_none() -> None:
    pieces, _ = answer(b"ab\nUs!", ["\nUser:"])
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "", "\nUs!", ""]


def test_a_token_with_a_part_of_the_stop_text_is_not_in_the_answer_but_its_text_before_that_is() -> None:
    words = ["one", " two. Th", "ree"]
    answering = Answering(lambda tokens: "".join(words[token] for token in tokens), [". "])
    assert answering.add(Choice(0)) == Piece("one", (Choice(0),))
    assert answering.add(Choice(1)) == Piece(" two", ())
    assert answering.end("length") == Piece("", (), "stop")
    assert answering.sure(2) == [0]
