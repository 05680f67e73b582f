"""Chats that outgrow the context: the oldest messages are dropped, up to where a user's message begins.

What is dropped follows from the messages, turn by turn: so the same chat is cut alike in every process, and goes on
from what is stored of it. What the last turn had dropped is remembered; that only saves time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cakekv.embedded.chat_template import ChatTemplate
from cakekv.errors import BadInput
from cakekv.prompt import Chat, Cut, Tokenized

_ROOM = 8
"""A chat is cut when less than one part in so many of the context is left for its answer."""
_ABOVE = ("system", "developer")
"""Roles of messages that are kept if the chat begins with them."""


class _Unclear(Exception):
    """Where a message begins cannot be told."""


def fitted(chat: Chat, prompt: Tokenized, template: ChatTemplate, context: int) -> Tokenized:
    """A chat's prompt without its oldest messages, if it is too long, and may be truncated.

    Parameters
    ----------
    chat, prompt : Chat, Tokenized
        The chat, and all of it in tokens.
    template : ChatTemplate
        Wrote it.
    context : int
        Tokens that the model's context has.

    Raises
    ------
    BadInput
        It cannot be made to fit.
    """
    room = context - context // _ROOM
    if chat.overflow == "refuse" or len(prompt.token_ids) <= room:
        return prompt
    try:
        cut = _cut(_Messages(chat, prompt, template), chat, prompt, room)
    except _Unclear as error:
        if len(prompt.token_ids) <= context:
            return prompt
        raise BadInput(
            f"the chat has {len(prompt.token_ids)} tokens, but the model's context is {context} tokens, and it cannot "
            f"be truncated, because {error}: leave out messages"
        ) from None
    if len(cut.token_ids) > context:
        raise BadInput(
            f"the chat has {len(prompt.token_ids)} tokens, and {len(cut.token_ids)} without all messages that can be "
            f"dropped, but the model's context is {context} tokens: shorten its last message, or what comes first"
        )
    return cut


def _cut(messages: _Messages, chat: Chat, prompt: Tokenized, room: int) -> Tokenized:
    roles = [str(message["role"]) for message in chat.messages]
    users = [number for number in range(messages.above + 1, len(roles)) if roles[number] == "user"]
    if not users:
        raise _Unclear("no message of a user's follows the first one")
    asked = [number for number in range(messages.above, len(roles)) if roles[number] == "assistant"] + [len(roles)]
    kept = messages.kept(users[-1])
    cuts: list[Cut] = []
    left = prompt.token_ids

    def drop(part: range) -> None:
        nonlocal left
        cuts.append(Cut(left, part, True))
        left = left[: part.start] + left[part.stop :]

    turn = 0
    if prompt.earlier is not None:
        for part in prompt.earlier.dropped:
            drop(part)
        turn = len(asked) - 1
        while turn and messages.begin(asked[turn - 1]) > prompt.earlier.tokens:
            turn -= 1
    while True:
        dropped = len(prompt.token_ids) - len(left)
        turn = bisect_right(asked, dropped + room, lo=turn, key=messages.begin)
        if turn == len(asked):
            return prompt._replace(token_ids=left, cuts=cuts)
        length = messages.begin(asked[turn]) - dropped
        droppable = [number for number in users if number < asked[turn]]
        least = max(length - room, (1 - chat.keep) * (length - kept))
        first = min(bisect_left(droppable, dropped + kept + least, key=messages.begin), len(droppable) - 1)
        part = range(kept, messages.begin(droppable[first]) - dropped if droppable else kept)
        if part:
            drop(part)
        turn += 1


class _Messages:
    """Where the messages of a chat begin in its tokens.

    Parameters
    ----------
    chat, prompt, template
        As in `fitted`.
    """

    def __init__(self, chat: Chat, prompt: Tokenized, template: ChatTemplate) -> None:
        assert prompt.text is not None, "it is a chat"
        self._chat, self._tokens, self._text, self._template = chat, prompt.token_ids, prompt.text, template
        self._text_cut = template.cut(self._text)
        self._is_cut_alike = self._text_cut.token_ids == self._tokens
        self._begins: dict[int, int] = {}
        roles = [message["role"] for message in chat.messages]
        self.above = next((number for number, role in enumerate(roles) if role not in _ABOVE), len(roles))
        """So many messages are kept."""

    def begin(self, number: int) -> int:
        """The position of a message's first token; of the one behind the last: where the chat ends."""
        if number not in self._begins:
            self._begins[number] = self._position(len(self._before(number)))
        return self._begins[number]

    def kept(self, last: int) -> int:
        """How many tokens stand before the first message that can be dropped; `last` is another user's message."""
        messages = [*self._chat.messages[: self.above], *self._chat.messages[last:]]
        short, behind = self._written(messages), self._text[len(self._before(last)) :]
        kept = len(short) - len(behind)
        if not short.endswith(behind) or short[:kept] != self._text[:kept]:
            raise _Unclear("its template writes messages differently where others are left out")
        return self._position(kept)

    def _before(self, number: int) -> str:
        """The text of the messages before one."""
        if not number:
            return ""
        text = self._written(self._chat.messages[:number], answering=False)
        if not self._text.startswith(text):
            raise _Unclear("its template writes messages differently once others follow")
        return text

    def _written(self, messages: Sequence[Mapping[str, Any]], answering: bool = True) -> str:
        """Other messages, as text."""
        try:
            return self._template.text(replace(self._chat, messages=messages), answering)
        except BadInput as error:
            raise _Unclear(str(error)) from None

    def _position(self, character: int) -> int:
        """The token that begins at a character of the text."""
        cut = self._text_cut
        behind = cut.after(character)
        if behind is None:
            raise _Unclear("no token begins where a message does")
        index = len(cut.token_ids) - len(behind)
        if self._is_cut_alike or not behind:
            return index if behind else len(self._tokens)
        token = behind[0]  # answers may have been generated in other tokens, but messages begin with special ones
        if self._tokens.count(token) != cut.token_ids.count(token):
            raise _Unclear("its answers were generated in other tokens than it is written in")
        number = cut.token_ids[:index].count(token)
        return [position for position, one in enumerate(self._tokens) if one == token][number]
