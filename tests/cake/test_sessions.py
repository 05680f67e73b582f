"""Sessions: messages in, answers out, and each turn restores what was said before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.embedded.session import Session
from cakekv.errors import BadInput
from cakekv.prompt import Chat
from cakekv.store.memory import MemoryStore
from tests.embedded.chatting import STRIPPING, talker, tokenizer

CHUNK = 16
SYSTEM = {"role": "system", "content": "a bad cab"}
SAID = ["abcd ef gh", "a", "cab bad fed cafe", "ij", "dad abcd"]
MERGED, PLAIN = tokenizer(), tokenizer(merged=False)
ENGINES = {id(made): talker(made) for made in (MERGED, PLAIN)}


def cake_of(store: Any, made: Any = MERGED, **options: Any) -> Cake:
    return Cake(ENGINES.get(id(made)) or talker(made), made, store, chunk_tokens=CHUNK, max_span_tokens=64, **options)


def expected(prompt: list[int], **options: Any) -> str:
    with cake_of(None) as cake:
        return cake.generate(prompt, **{"max_new_tokens": 21, **options}).text


def test_tokens_are_kept_as_they_were_generated_and_found_by_the_next_turn() -> None:
    was_kept = False
    with cake_of("memory://") as cake:
        session = cake.session([SYSTEM])
        before: list[int] = []
        for said in SAID:
            prompt = cake.prefill(Chat([*session.messages, {"role": "user", "content": said}]), save=False).token_ids
            assert prompt[: len(before)] == before
            answer = session.send(said, max_new_tokens=21, mode="load", temperature=2.0, top_k=3, seed=3)
            assert answer.text == expected(prompt, temperature=2.0, top_k=3, seed=3)
            assert answer.report is session.report
            assert answer.cached_tokens == answer.report.loaded_tokens
            assert len(before) - 1 <= answer.cached_tokens <= len(before)
            assert not answer.report.notes
            before = prompt + answer.token_ids
            was_kept = was_kept or before != MERGED(MERGED.decode(before), add_special_tokens=False)["input_ids"]
            cake.wait_saved()
    assert was_kept, "else the test shows nothing"
    assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 5]
    assert session.messages[-1]["content"] == answer.text


def test_after_a_restart_the_same_messages_find_what_is_stored(tmp_path: Path) -> None:
    messages: list[Any] = [SYSTEM]
    known = 0
    for said in SAID:
        with cake_of(str(tmp_path), PLAIN) as cake:
            session = cake.session(messages)
            answer = session.send(said, max_new_tokens=21, mode="load")
            assert known - 1 <= answer.cached_tokens <= known
            known = answer.report.prompt_tokens + len(answer.token_ids)
            messages = session.messages


def test_where_a_restart_cuts_an_answer_otherwise_it_is_restored_so_far(tmp_path: Path) -> None:
    with cake_of(str(tmp_path)) as cake:
        session = cake.session()
        session.send(SAID[0], max_new_tokens=40)
    with cake_of(str(tmp_path)) as cake:
        prompt = cake.prefill(Chat([*session.messages, {"role": "user", "content": "j"}]), save=False).token_ids
        answer = cake.session(session.messages).send("j", max_new_tokens=21)
        assert answer.text == expected(prompt)


def test_a_template_that_leaves_out_how_answers_begin() -> None:
    made = tokenizer(template=STRIPPING)
    engine = talker(made)
    with Cake(engine, made, "memory://", chunk_tokens=CHUNK) as cake:
        session = cake.session([SYSTEM])
        first = session.send(SAID[2], max_new_tokens=30)
        cake.wait_saved()
        second = session.send(SAID[1], max_new_tokens=30, mode="load")
        prompt = cake.prefill(Chat(session.messages[:-1])).token_ids
    with Cake(engine, made, chunk_tokens=CHUNK) as cake:
        assert cake.generate(prompt, max_new_tokens=30).text == second.text
    assert second.cached_tokens == first.report.prompt_tokens // CHUNK * CHUNK
    assert any("30 tokens" in note for note in second.report.notes)


def test_tools_and_their_results() -> None:
    tools = [{"name": "cafe"}]
    with cake_of("memory://") as cake:
        session = cake.session([SYSTEM], tools=tools)
        session.send("abcd", max_new_tokens=8)
        answer = session.send([{"role": "tool", "content": "fed"}, {"role": "tool", "content": "ij"}], max_new_tokens=8)
        prompt = cake.prefill(Chat(session.messages[:-1], tools)).token_ids
        assert MERGED.decode(prompt).startswith("<s><tool>cafe <end><system>a bad cab<end><user>abcd<end>")
        assert answer.text == expected(prompt, max_new_tokens=8)
        answered = cake.session([{"role": "user", "content": "j"}]).send(max_new_tokens=3)
        assert answered.text == cake.session().send({"role": "user", "content": "j"}, max_new_tokens=3).text


def test_a_fork_goes_its_own_way() -> None:
    with cake_of("memory://") as cake:
        session = cake.session([SYSTEM])
        session.send(SAID[0], max_new_tokens=21)
        other = session.fork()
        cake.wait_saved()
        first, second = session.send("j", max_new_tokens=9), other.send("cab", max_new_tokens=9, mode="load")
        assert second.cached_tokens > CHUNK
    assert session.messages[:3] == other.messages[:3]
    assert [session.messages[3]["content"], other.messages[3]["content"]] == ["j", "cab"]
    assert session.messages[4]["content"] == first.text


def test_streams_and_asyncio_say_the_same() -> None:
    with cake_of("memory://") as cake:
        session = cake.session([SYSTEM])
        texts = [session.send(said, max_new_tokens=12).text for said in SAID[:2]]
        streamed = cake.session([SYSTEM])
        assert ["".join(streamed.stream(said, max_new_tokens=12)) for said in SAID[:2]] == texts

        async def chat() -> list[str]:
            one, two = cake.session([SYSTEM]), cake.session([SYSTEM])
            sent = [(await one.asend(said, max_new_tokens=12)).text for said in SAID[:2]]
            pieces = ["".join([piece async for piece in two.astream(said, max_new_tokens=12)]) for said in SAID[:2]]
            assert one.messages == two.messages == streamed.messages == session.messages
            assert two.report is not None
            assert sent == pieces
            return sent

        assert asyncio.run(chat()) == texts


def test_a_turn_that_is_broken_off_was_never_said() -> None:
    with cake_of("memory://") as cake:
        session = cake.session([SYSTEM])
        text = cake.session([SYSTEM]).send(SAID[0], max_new_tokens=21).text
        pieces = session.stream(SAID[0], max_new_tokens=21)
        next(pieces)
        with pytest.raises(BadInput, match="answering something else"):
            session.send("j")
        pieces.close()  # type: ignore[attr-defined]
        with pytest.raises(BadInput, match="temperature"):
            session.send(SAID[0], temperature=-1.0)
        assert session.messages == [SYSTEM]
        assert session.send(SAID[0], max_new_tokens=21).text == text


def test_messages_may_be_changed_between_turns() -> None:
    with cake_of("memory://") as cake:
        session = cake.session([SYSTEM])
        first = session.send(SAID[0], max_new_tokens=21).text
        session.send(SAID[1], max_new_tokens=21)
        del session.messages[1:]
        assert session.send(SAID[0], max_new_tokens=21).text == first


def test_several_sessions_at_once() -> None:
    with cake_of("memory://") as cake:
        alone = [cake.session([SYSTEM]) for _ in range(3)]
        for number, session in enumerate(alone):
            for said in SAID[number : number + 2]:
                session.send(said, max_new_tokens=9)
        together = [cake.session([SYSTEM]) for _ in range(3)]

        def talk(number: int, session: Session) -> None:
            for said in SAID[number : number + 2]:
                session.send(said, max_new_tokens=9)

        threads = [threading.Thread(target=talk, args=one) for one in enumerate(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [session.messages for session in together] == [session.messages for session in alone]


USES: dict[str, tuple[Callable[[Cake], Any], str]] = {
    "no messages": (lambda cake: cake.session().send(), "empty"),
    "text": (lambda cake: cake.session("hello"), "list of mappings"),  # type: ignore[arg-type]
    "texts": (lambda cake: cake.session().send(["hello"]), "message 0"),  # type: ignore[list-item]
    "no role": (lambda cake: cake.session([{"content": "a"}]), "message 0"),
    "role": (lambda cake: cake.session().send({"role": "judge", "content": "a"}), "no judge"),
    "half a character": (lambda cake: cake.session().send("\ud800"), "surrogate"),
    "too long": (lambda cake: cake.session().send("a" * 2000), "context is 1024"),
    "plain list": (lambda cake: cake.generate([SYSTEM]), r"Chat\(messages\)"),
}


@pytest.mark.parametrize("use", USES)
def test_what_cannot_be_answered_is_refused_with_the_reason(use: str) -> None:
    call, words = USES[use]
    with cake_of(MemoryStore()) as cake, pytest.raises(BadInput, match=words):
        call(cake)


def test_without_a_template_there_are_no_chats() -> None:
    with cake_of(None, tokenizer(template=None)) as cake:
        with pytest.raises(BadInput, match=r"set tokenizer\.chat_template"):
            cake.session()
        with pytest.raises(BadInput, match=r"set tokenizer\.chat_template"):
            cake.prefill(Chat([SYSTEM]))
    with Cake(ENGINES[id(MERGED)]) as cake, pytest.raises(BadInput, match="pass one to Cake"):
        cake.session()
