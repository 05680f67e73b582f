"""Text to tokens and back, for several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cakekv.compress.base import Marked
from cakekv.embedded.chat_overflow import fitted
from cakekv.embedded.chat_template import ChatTemplate
from cakekv.embedded.transcript import Transcript
from cakekv.errors import BadInput
from cakekv.prompt import (
    Chat,
    Cut,
    Document,
    Place,
    PlainPrompt,
    Prompt,
    Tokenized,
    Truncated,
    check_text,
    marked_in,
    marked_without,
    parts_of,
    token_ids,
)
from cakekv.reuse.truncated import dropped_runs


class Tokenizing:
    """A tokenizer of transformers; they are not made for several threads.

    Parameters
    ----------
    tokenizer : transformers tokenizer or None
        None: prompts are token ids, and answers have no text.

    Raises
    ------
    BadInput
        It is something else.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise BadInput(
                f"the tokenizer is {tokenizer!r:.60}: give a tokenizer of transformers, such as by "
                "AutoTokenizer.from_pretrained, or None"
            )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self.template = ChatTemplate(tokenizer, self._lock)
        self.transcript = Transcript(self.template)

    def prompt(self, prompt: Prompt, notes: list[str], tenant: str | None = None) -> Tokenized:
        """A prompt's token ids, and where its documents stand; what should be known about them is noted.

        Parts are cut into tokens one by one. Only the first one, and documents, begin as the tokenizer begins texts.

        Raises
        ------
        BadInput
            As for `tokens`.
        """
        if isinstance(prompt, Truncated):
            tokenized = self._truncated(prompt, notes, tenant)
            if tokenized.cuts:
                notes.append(_what_was_dropped(tokenized))
            return tokenized
        if isinstance(prompt, Chat):
            return self.transcript.prompt(prompt, notes, tenant)
        parts = parts_of(prompt)
        if parts is None:
            tokens = self.tokens(prompt, notes)  # type: ignore[arg-type]  # it has no parts
            return Tokenized(tokens, tenant=tenant, marked=marked_in(prompt))
        tokens = []
        places, marked = [], list[Marked]()
        for part in parts:
            if isinstance(part, Document):
                own = self.document(part)
                if own:
                    places.append(Place(len(tokens), len(own)))
            else:
                own = self._plain(part) if tokens and isinstance(part, str) else self.tokens(part, notes)
            marked += marked_in(part.content if isinstance(part, Document) else part, len(tokens))
            tokens += own
        return Tokenized(tokens, places, tenant=tenant, marked=marked)

    def fitted(self, prompt: Prompt, tokenized: Tokenized, context: int, notes: list[str]) -> Tokenized:
        """A prompt, truncated to the model's context if it is a chat that may be.

        Raises
        ------
        BadInput
            It cannot be made to fit.
        """
        if isinstance(prompt, Chat):
            tokenized = fitted(prompt, tokenized, self.template, context)
            if tokenized.cuts:
                notes.append(_what_was_dropped(tokenized))
        return tokenized

    def with_question(self, prompt: Prompt, tokenized: Tokenized) -> Tokenized:
        """The same; from the last message of a chat's user on, it is marked as the question, if that can be told."""
        while isinstance(prompt, Truncated):
            prompt = prompt.content
        if not isinstance(prompt, Chat) or tokenized.text is None:
            return tokenized
        number = max((at for at, message in enumerate(prompt.messages) if message["role"] == "user"), default=0)
        if not number:
            return tokenized
        try:
            before = self.template.text(replace(prompt, messages=prompt.messages[:number]), answering=False)
        except BadInput:  # a template need not take a chat that ends there
            return tokenized
        if not tokenized.text.startswith(before):
            return tokenized
        asked, end = self.template.plain(tokenized.text[len(before) :]), len(tokenized.token_ids)
        start = end - len(asked)
        if not asked or tokenized.token_ids[start:] != asked:
            return tokenized
        return tokenized._replace(marked=[Marked(start, end, "question")])

    def _truncated(self, prompt: Truncated, notes: list[str], tenant: str | None) -> Tokenized:
        content, dropped = prompt.content, prompt.dropped
        tokenize = self._truncated if isinstance(content, Truncated) else self.prompt
        before = tokenize(content, notes, tenant)  # type: ignore[arg-type]  # each takes its own
        if before.documents:
            raise BadInput("a prompt with documents cannot be truncated: give its token ids, or leave out documents")
        tokens = before.token_ids
        if not isinstance(dropped, range) or dropped.step != 1 or not 0 <= dropped.start <= dropped.stop <= len(tokens):
            raise BadInput(
                f"dropped is {dropped!r:.60}, but must be a range of positions of the prompt, which has {len(tokens)} "
                "tokens, such as range(64, 1056)"
            )
        if not dropped:
            return before
        left = tokens[: dropped.start] + tokens[dropped.stop :]
        cuts = [*before.cuts, Cut(tokens, dropped, prompt.turn)]
        return before._replace(token_ids=left, cuts=cuts, marked=marked_without(before.marked, dropped))

    def document(self, document: Document) -> list[int]:
        """A document's token ids.

        Raises
        ------
        BadInput
            As for `tokens`.
        """
        content = document.content
        if not isinstance(content, str):
            return token_ids(content)
        tokens = self._plain(content)
        if not tokens or not document.bos:
            return tokens
        bos = getattr(self._tokenizer, "bos_token_id", None)
        with self._lock:
            begins = token_ids(self._tokenizer("a")["input_ids"])[:1]
        return [*begins, *tokens] if begins == [bos] and tokens[0] != bos else tokens

    def _plain(self, text: str) -> list[int]:
        """Token ids of a text that follows something else."""
        self._check(text)
        with self._lock:
            return token_ids(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check(self, text: str) -> None:
        if self._tokenizer is None:
            raise BadInput("the prompt is text, but there is no tokenizer: pass one to Cake, or give token ids")
        check_text(text, "the prompt")

    def tokens(self, prompt: PlainPrompt, notes: list[str]) -> list[int]:
        """The token ids of a prompt without parts; what should be known about them is noted.

        Raises
        ------
        BadInput
            It is text, and there is no tokenizer; or it is no prompt.
        """
        if not isinstance(prompt, str):
            return token_ids(prompt)
        self._check(prompt)
        with self._lock:
            tokens = token_ids(self._tokenizer(prompt)["input_ids"])
            if self._repeats_bos(prompt, tokens):
                notes.append(
                    f"The text begins with {self._tokenizer.bos_token}, as chat templates write it, and the tokenizer "
                    "puts another one in front, which was left out."
                )
                del tokens[0]
        return tokens

    def _repeats_bos(self, text: str, tokens: list[int]) -> bool:
        """Whether the text has the token that the tokenizer puts in front."""
        bos = getattr(self._tokenizer, "bos_token", None)
        if not bos or not text.startswith(bos) or tokens[:2] != [self._tokenizer.bos_token_id] * 2:
            return False
        plain = token_ids(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens[1 : len(plain) + 1] == plain

    def token(self, token: int) -> str:
        """What a token says by itself, special or not; characters that it has only a part of are U+FFFD."""
        with self._lock:
            return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer says; empty if there is no tokenizer."""
        if self._tokenizer is None:
            return ""
        with self._lock:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _what_was_dropped(prompt: Tokenized) -> str:
    runs = dropped_runs(prompt)
    where = ", ".join(f"{run.start} to {run.stop - 1}" for run in runs)
    tokens = sum(map(len, runs))
    return (
        f"{tokens:,} of {tokens + len(prompt.token_ids):,} tokens of the prompt were dropped, the positions {where}; "
        "what is left of it in the store was computed behind them."
    )
