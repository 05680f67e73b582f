from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sessions import CHATS, row, talk
from cakekv.cake import Cake
from tests.embedded.chatting import talker, tokenizer


def test_a_chat_is_restored_with_its_answers(tmp_path: Path) -> None:
    made = tokenizer(merged=False)
    with Cake(talker(made), made, chunk_tokens=16, max_span_tokens=32) as cake:
        chat = {"system": "a bad cab " * 4, "said": ["abcd", "ef gh", "j"]}
        turns = talk(cake, tmp_path, chat, 21, "load", cuts=True)
    assert [turn.number for turn in turns] == [1, 2, 3]
    assert turns[0].before == turns[0].loaded == 0
    for turn in turns[1:]:
        assert turn.share(turn.loaded) == turn.share(turn.restarted_loaded) == 1.0
        assert turn.restored_loaded < turn.loaded
        assert not turn.differs
        assert not turn.restarted_differs
        assert not turn.cuts_differ
        assert not turn.cut_otherwise
    assert row(1, turns[:1])["loaded_share"] is None
    assert row(2, turns[1:2])["loaded_share"] == 1.0


def test_the_chats_are_long_enough() -> None:
    chats = json.loads(CHATS.read_text())
    assert len(chats) == 10
    assert all(len(chat["said"]) >= 8 for chat in chats)
    assert len({said for chat in chats for said in chat["said"]}) == sum(len(chat["said"]) for chat in chats)
