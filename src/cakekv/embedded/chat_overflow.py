"""Chats that outgrow the context: the oldest messages are dropped, up to where a user's message begins.

What is dropped follows from the messages, turn by turn: so the same chat is cut alike in every process, and goes on
from what is stored of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cakekv.embedded.chat_template import ChatTemplate
from cakekv.errors import BadInput, PromptTooLong
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
        raise PromptTooLong(
            f"the chat has {len(prompt.token_ids)} tokens, but the model's context is {context} tokens, and it cannot "
            f"be truncated, because {error}: leave out messages"
        ) from None
    if len(cut.token_ids) > context:
        raise PromptTooLong(
            f"the chat has {len(prompt.token_ids)} tokens, and {len(cut.token_ids)} without all messages that can be "
            f"dropped, but the model's context is {context} tokens: shorten its last message, or what comes first"
        )
    return cut


def _cut(messages: _Messages, chat: Chat, prompt: Tokenized, room: int) -> Tokenized:
    roles = [str(message["role"]) for message in chat.messages]
    users = [messages.begins[number] for number in range(messages.above + 1, len(roles)) if roles[number] == "user"]
    asked = [messages.begins[number] for number in range(messages.above, len(roles)) if roles[number] == "assistant"]
    kept = messages.begins[messages.above]
    cuts: list[Cut] = []
    left, dropped = prompt.token_ids, 0
    for end in [*asked, messages.begins[len(roles)]]:
        length = end - dropped
        if length <= room:
            continue
        least = max(length - room, (1 - chat.keep) * (length - kept))
        droppable = users[: bisect_left(users, end)]
        first = min(bisect_left(droppable, dropped + kept + least), len(droppable) - 1)
        part = range(kept, droppable[first] - dropped if droppable else kept)
        if part:
            cuts.append(Cut(left, part, True))
            left = left[: part.start] + left[part.stop :]
            dropped += len(part)
    return prompt._replace(token_ids=left, cuts=cuts)


class _Messages:
    """Where the messages of a chat begin in its tokens.

    Parameters
    ----------
    chat, prompt, template
        As in `fitted`.

    Attributes
    ----------
    above : int
        So many messages are kept.
    begins : dict of int
        By the number of every other message, the position of its first token; and where the chat ends.
    """

    def __init__(self, chat: Chat, prompt: Tokenized, template: ChatTemplate) -> None:
        assert prompt.text is not None, "it is a chat"
        self._chat, self._tokens, self._text, self._template = chat, prompt.token_ids, prompt.text, template
        roles = [message["role"] for message in chat.messages]
        self.above = next((number for number, role in enumerate(roles) if role not in _ABOVE), len(roles))
        last = max((number for number in range(self.above + 1, len(roles)) if roles[number] == "user"), default=None)
        if last is None:
            raise _Unclear("no message of a user's follows the first one")
        kept = self._kept(last)
        self.begins = self._positions(dict(zip(range(self.above, len(roles) + 1), self._characters(kept), strict=True)))

    def _kept(self, last: int) -> int:
        """Where the first message begins that can be dropped, in characters; `last` is another user's message."""
        messages = [*self._chat.messages[: self.above], *self._chat.messages[last:]]
        short, behind = self._written(messages), self._text[len(self._before(last)) :]
        kept = len(short) - len(behind)
        if not short.endswith(behind) or short[:kept] != self._text[:kept]:
            raise _Unclear("its template writes messages differently where others are left out")
        return kept

    def _characters(self, kept: int) -> Iterator[int]:
        """Where every message that is not kept begins in the text, and the last one ends."""
        messages, begin = self._chat.messages, kept
        yield begin
        for number in range(self.above, len(messages)):
            try:  # most templates write a message by itself as they do among others
                alone = self._written([*messages[: self.above], messages[number]], answering=False)
                written = alone[kept:] if alone[:kept] == self._text[:kept] else ""
            except _Unclear:
                written = ""
            if written and self._text.startswith(written, begin):
                begin += len(written)
            else:
                begin = len(self._before(number + 1))
            yield begin

    def _before(self, number: int) -> str:
        """The text of the messages before one."""
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

    def _positions(self, characters: Mapping[int, int]) -> dict[int, int]:
        """The tokens that begin at characters of the text."""
        cut = self._template.cut(self._text)
        if cut.ends is None:
            raise _Unclear("its tokenizer does not tell where tokens begin")
        positions = {}
        for number, character in characters.items():
            index = bisect_right(cut.ends, character)
            if index and cut.ends[index - 1] != character:
                raise _Unclear("no token begins where a message does")
            positions[number] = index
        if cut.token_ids == self._tokens:
            return positions
        # Answers were generated in other tokens than they are written in; messages begin with special ones.
        signs = {cut.token_ids[index] for index in positions.values() if index < len(cut.token_ids)}
        theirs, ours = (
            [index for index, token in enumerate(tokens) if token in signs] for tokens in (cut.token_ids, self._tokens)
        )
        if [cut.token_ids[index] for index in theirs] != [self._tokens[index] for index in ours]:
            raise _Unclear("its answers were generated in other tokens than they are written in")
        same = dict(zip(theirs, ours, strict=True)) | {len(cut.token_ids): len(self._tokens)}
        return {number: same[index] for number, index in positions.items()}
