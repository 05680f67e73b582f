"""Sessions that outgrow the context: the oldest messages go, the others move, and each turn goes on from the last."""

from __future__ import annotations

from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.errors import BadInput
from cakekv.prompt import Chat
from cakekv.store.memory import MemoryStore
from tests.embedded.chatting import TEMPLATE, talker, tokenizer

CHUNK, CONTEXT = 16, 256
SYSTEM = {"role": "system", "content": "a bad cab"}
SAID = ["abcd ef gh", "a", "cab bad fed cafe", "ij", "dad abcd", "cab " * 12]
MERGED, PLAIN = tokenizer(), tokenizer(merged=False)


def engine_of(made: Any) -> Any:
    engine = talker(made)
    engine.max_context = engine.model.config.max_position_embeddings = CONTEXT
    return engine


ENGINES = {id(made): engine_of(made) for made in (MERGED, PLAIN)}


def cake_of(store: Any, made: Any = MERGED, **options: Any) -> Cake:
    engine = ENGINES.get(id(made)) or engine_of(made)
    return Cake(engine, made, store, chunk_tokens=CHUNK, max_span_tokens=64, **options)


def user(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


def check_written(made: Any, text: str, messages: list[Any]) -> int:
    """The text is what the template writes of the system message and of the last messages; how many it leaves out."""
    for left_out in range(len(messages)):
        shorter = [messages[0], *messages[1 + left_out :]]
        if text == made.apply_chat_template(shorter, tokenize=False, add_generation_prompt=True):
            return left_out
    raise AssertionError(f"no template writes {text}")


@pytest.mark.parametrize(("made", "restarts"), [(MERGED, False), (PLAIN, False), (PLAIN, True)])
def test_a_session_goes_on_for_ever(made: Any, restarts: bool) -> None:
    store, messages, left_out, was_moved = MemoryStore(), [SYSTEM], 0, 0
    cake = cake_of(store, made)
    session = cake.session(messages)
    for turn in range(24):
        said = SAID[turn % len(SAID)]
        chat = Chat([*messages, user(said)], overflow="truncate")
        prompt = cake.prefill(chat, mode="load", save=False)
        if made is PLAIN and turn % 3 == 0:
            with cake_of(None, made) as fresh:
                assert fresh.prefill(chat).token_ids == prompt.token_ids, "who remembers nothing cuts alike"
        before, left_out = left_out, check_written(made, made.decode(prompt.token_ids), [*messages, user(said)])
        assert left_out >= before
        answer = session.send(said, max_new_tokens=20, mode="load", temperature=1.5, top_k=3, seed=turn)
        report, messages = answer.report, session.messages
        assert report.prompt_tokens == len(prompt.token_ids) <= CONTEXT - CONTEXT // 8
        assert (report.dropped_tokens > 0) == (left_out > 0) == any("dropped" in note for note in report.notes)
        assert report.exact == (report.moved_tokens + report.reused_tokens == 0)
        new = len(made(said + "<user><end><assistant>")["input_ids"])
        head = len(made("<s><system>a bad cab<end>")["input_ids"]) % CHUNK if left_out else 0
        assert turn == 0 or report.computed_tokens <= new + head + 1 + 1, "all but the new message is restored"
        was_moved += report.moved_tokens
        cake.wait_saved()
        if restarts:
            cake.close()
            cake = cake_of(store, made)
            session = cake.session(messages)
    cake.close()
    assert left_out > 20
    assert was_moved > 1000
    assert len(messages) == 49


def test_what_is_kept_is_at_most_the_share_that_was_asked_for() -> None:
    lengths = []
    for keep in (0.0, 0.5, 1.0):
        with cake_of(None) as cake:
            session = cake.session([SYSTEM], keep=keep)
            dropped = 0
            while not dropped:
                dropped = session.send("abcd ef gh", max_new_tokens=12).report.dropped_tokens
            assert session.report is not None
            lengths.append(session.report.prompt_tokens)
            again = session.fork().send("a", max_new_tokens=2).report.dropped_tokens
            assert again == dropped or keep == 1.0, "there is room again for a while, unless all is to be kept"
    assert lengths == sorted(set(lengths)), lengths
    assert lengths[0] < CONTEXT // 4 < lengths[1] < CONTEXT // 2 + 50 < lengths[2]


def test_a_session_that_may_not_be_truncated_is_refused() -> None:
    messages = [SYSTEM, *[user("abcd ef gh"), {"role": "assistant", "content": "ij"}] * 40]
    with cake_of("memory://") as cake:
        for refused in (Chat([*messages, user("a")]), Chat([*messages, user("a")], overflow="refuse")):
            with pytest.raises(BadInput, match="context"):
                cake.prefill(refused)
        session = cake.session(messages, overflow="refuse")
        with pytest.raises(BadInput, match="context"):
            session.send("a")
        assert session.messages == messages
        assert cake.session(messages).send("a", max_new_tokens=2).report.dropped_tokens > 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([SYSTEM, user("abcd ef gh " * 40)], "no message of a user's follows"),
        ([SYSTEM, user("a"), {"role": "assistant", "content": "ij"}, user("b " * 300)], "shorten its last message"),
        (
            [{"role": "system", "content": "b " * 300}, user("a"), {"role": "assistant", "content": "a"}, user("a")],
            "first",
        ),
    ],
)
def test_what_does_not_fit_either_way_is_refused(messages: list[Any], message: str) -> None:
    with cake_of(None) as cake, pytest.raises(BadInput, match=message):
        cake.session(messages).send(max_new_tokens=2)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.replace("<s>", "<s>{{ 'a' * (messages | length) }}"), "once others follow"),
        (TEMPLATE.replace("<s>", "<s>{{ messages[1].content }}"), "where others are left out"),
        (TEMPLATE.replace("<s>", "<s>{% if messages | length % 2 %}{{ raise_exception('odd') }}{% endif %}"), "odd"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused_with_the_reason(template: str, message: str) -> None:
    made = tokenizer(template=template)
    messages: list[Any] = [SYSTEM, user("cafe")]
    with cake_of(None, made) as cake:
        while len(cake.prefill(Chat(messages, overflow="truncate")).token_ids) < CONTEXT - 30:
            messages += [{"role": "assistant", "content": "ij"}, user("abcd ef")]
        messages += [{"role": "assistant", "content": "ij"}, user("abcd ef gh " * 6)]
        with pytest.raises(BadInput, match=message):
            cake.prefill(Chat(messages, overflow="truncate"))


def test_chats_without_a_system_message_keep_what_the_template_puts_first() -> None:
    messages = [*[user("abcd ef gh"), {"role": "assistant", "content": "ij"}] * 40, user("a")]
    with cake_of("memory://") as cake:
        prompt = MERGED.decode(cake.prefill(Chat(messages, tools=[{"name": "cafe"}], overflow="truncate")).token_ids)
    assert prompt.startswith("<s><tool>cafe <end><user>abcd ef gh<end><assistant>ij<end>")
    assert prompt.endswith("<user>a<end><assistant>")


def test_tool_calls_are_dropped_with_the_question_that_led_to_them() -> None:
    asked: list[Any] = [user("abcd"), {"role": "assistant", "content": "ij"}, {"role": "tool", "content": "cafe " * 3}]
    messages = [SYSTEM, *[*asked, {"role": "assistant", "content": "fed"}] * 12, *asked]
    with cake_of("memory://") as cake:
        prompt = MERGED.decode(cake.prefill(Chat(messages, overflow="truncate")).token_ids)
    assert prompt.startswith("<s><system>a bad cab<end><user>abcd<end><assistant>ij<end><tool>cafe")
    assert check_written(MERGED, prompt, messages) % 4 == 0


@pytest.mark.parametrize("options", [{"overflow": "drop"}, {"keep": 1.5}, {"keep": "half"}])
def test_options_out_of_range_are_refused(options: Any) -> None:
    with cake_of(None) as cake, pytest.raises(BadInput, match=next(iter(options))):
        cake.session([SYSTEM], **options)
