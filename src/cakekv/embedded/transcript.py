"""Chats to token ids, by the model's chat template; answers that were generated here keep their very tokens.

A template writes the whole chat as text, and the same text can be cut into other tokens than those that were generated.
So what was generated is remembered by the text that it answered: a chat that begins with this text, and goes on as the
answer does, gets the answer's tokens, as far as the two are the same.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from blake3 import blake3

from cakekv.embedded.chat_template import ChatTemplate, CutText
from cakekv.prompt import Chat, Tokenized

_MOST_TOKENS = 1 << 22
"""Of all remembered chats together; each takes four bytes."""
_ANSWERS = 8
"""Remembered of those to one text."""


class _Answered(NamedTuple):
    """A chat, as it was generated."""

    prompt: array[int]
    answer: array[int]


class Transcript:
    """What was generated in chats lately. May be called from several threads.

    Parameters
    ----------
    template : ChatTemplate
        Writes chats as text, and cuts them into tokens.
    most_tokens : int
        How much is remembered, in tokens; of what is more, what was not asked for the longest is forgotten.
    """

    def __init__(self, template: ChatTemplate, most_tokens: int = _MOST_TOKENS) -> None:
        self._template = template
        self._most_tokens = most_tokens
        self._lock = threading.Lock()
        self._answered: OrderedDict[bytes, list[_Answered]] = OrderedDict()
        """By the digest of the text that was answered."""
        self._lengths: Counter[int] = Counter()
        """Of those texts, in bytes."""
        self._length_of: dict[bytes, int] = {}
        self._tokens = 0

    def prompt(self, chat: Chat, notes: list[str], tenant: str | None = None) -> Tokenized:
        """A chat's token ids, ready to be answered; it is noted if an answer is not in it as it was generated.

        Only the same tenant's answers are known.

        Raises
        ------
        BadInput
            There is no chat template, or it does not take the chat.
        """
        text = self._template.text(chat)
        before, answers = self._find(text, _salt(tenant))
        if not answers:
            return Tokenized(self._template.cut(text).token_ids, text=text, tenant=tenant)
        end, kept, best = self._closest(answers, text, before)
        if kept == len(best.answer):
            rest = self._template.cut(text).after(end) if end < len(text) else []
            rest = self._template.plain(text[end:]) if rest is None else rest
        else:
            kept, rest = self._kept(self._template.cut(text), best, kept, text, before)
            if before < len(text):
                notes.append(
                    f"Of the last answer's {len(best.answer)} tokens, the chat goes on as the first {kept} do: its "
                    "template (which may leave out thinking), or whoever gave the messages, has changed the others. "
                    "What follows is computed."
                )
        return Tokenized([*best.prompt, *best.answer[:kept], *rest], text=text, tenant=tenant)

    def answered(self, prompt: Tokenized, answer: Sequence[int]) -> None:
        """A chat was answered, to the end, by these tokens; the one that ends the answer is not among them."""
        assert prompt.text is not None, "it came from `prompt`"
        data = prompt.text.encode()
        digest = blake3(_salt(prompt.tenant) + data).digest()
        whole = prompt.cuts[0].token_ids if prompt.cuts else prompt.token_ids
        new = _Answered(array("l", whole), array("l", answer))
        with self._lock:
            known = self._forget(digest)
            known = [one for one in known if one != new][-_ANSWERS + 1 :]
            self._answered[digest] = [*known, new]
            self._length_of[digest] = len(data)
            self._lengths[len(data)] += 1
            self._tokens += sum(map(_size, self._answered[digest]))
            while self._tokens > self._most_tokens and self._answered:
                self._forget(next(iter(self._answered)))

    def _forget(self, digest: bytes) -> list[_Answered]:
        known = self._answered.pop(digest, [])
        if known:
            length = self._length_of.pop(digest)
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]
            self._tokens -= sum(map(_size, known))
        return known

    def _find(self, text: str, salt: bytes) -> tuple[int, list[_Answered]]:
        """The longest beginning of a text that was answered: its length, in characters, and the answers."""
        data = text.encode()
        with self._lock:
            lengths = sorted(length for length in self._lengths if length <= len(data))
        content, found, start = blake3(salt), (0, b""), 0
        for length in lengths:
            content.update(data[start:length])
            start, digest = length, content.digest()
            if digest in self._answered:
                found = length, digest
        with self._lock:
            answers = list(self._answered.get(found[1], ()))
            if answers:
                self._answered.move_to_end(found[1])
        return len(data[: found[0]].decode()), answers

    def _closest(self, answers: Sequence[_Answered], text: str, before: int) -> tuple[int, int, _Answered]:
        """The answer that has most in common with how a text goes on: where that ends, in how many of its tokens."""
        common = [(self._template.common(one.prompt, one.answer, text, before), one) for one in reversed(answers)]
        (kept, end), best = max(common, key=lambda one: (one[0][1], one[0][0] == len(one[1].answer)))
        return end, kept, best

    def _kept(self, cut: CutText, one: _Answered, most: int, text: str, before: int) -> tuple[int, list[int]]:
        """Of an answer that the text leaves, how many tokens to keep, and what follows: where a token begins, too."""
        for kept in range(most, -1, -1):
            end = before + len(self._template.said(one.prompt, one.answer[:kept]))
            rest = cut.after(end)
            if rest is not None:
                return kept, rest
        return 0, self._template.plain(text[before:])


def _salt(tenant: str | None) -> bytes:
    return b"" if tenant is None else blake3(tenant.encode(), derive_key_context="cakekv transcript").digest()


def _size(one: _Answered) -> int:
    return len(one.prompt) + len(one.answer)
