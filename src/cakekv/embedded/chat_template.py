"""A model's chat template: chats as text, the text's tokens, and what a text has in common with generated tokens."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from cakekv.errors import BadInput
from cakekv.prompt import Chat, check_text, ids_of, token_ids

_CONTEXT = 8
"""Tokens before an answer with which it is decoded: some tokenizers write the first token of a text differently."""
_PART = "\ufffd"
"""Stands for a character of which tokens are missing."""


class CutText(NamedTuple):
    """A text in tokens."""

    token_ids: list[int]
    ends: list[int] | None
    """Where each token's characters end; None if the tokenizer does not tell."""

    def after(self, position: int) -> list[int] | None:
        """The tokens behind a character; None if none ends there."""
        if self.ends is None:
            return None
        index = bisect_right(self.ends, position)
        return self.token_ids[index:] if index == 0 or self.ends[index - 1] == position else None


class ChatTemplate:
    """The chat template of a tokenizer.

    Parameters
    ----------
    tokenizer : transformers tokenizer or None
        It need not have one, if no chats come.
    lock : Lock
        Held while the tokenizer is used.
    """

    def __init__(self, tokenizer: Any, lock: threading.Lock) -> None:
        self._tokenizer = tokenizer
        self._lock = lock

    def check(self) -> None:
        """Raise `BadInput` if there is no template."""
        if self._tokenizer is None:
            raise BadInput("a chat needs a tokenizer with a chat template: pass one to Cake, or give token ids")
        if not getattr(self._tokenizer, "chat_template", None):
            raise BadInput(
                "the tokenizer has no chat template, as those of models that were not trained to chat: set "
                "tokenizer.chat_template to the one that the model was trained with, or write the prompt yourself and "
                "give it to generate()"
            )

    def text(self, chat: Chat, answering: bool = True) -> str:
        """A chat as text, up to where its next answer begins, or without that.

        Raises
        ------
        BadInput
            There is no template, or it does not take this chat.
        """
        self.check()
        options: dict[str, Any] = {"add_generation_prompt": True, **chat.template}
        if not answering:
            options["add_generation_prompt"] = False
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    [dict(message) for message in chat.messages],
                    tools=None if chat.tools is None else list(chat.tools),
                    tokenize=False,
                    **options,
                )
        except ImportError as error:
            raise BadInput(f"chat templates need another package ({error}): pip install jinja2") from error
        except Exception as error:  # whatever the template's own code makes of messages it was not written for
            raise BadInput(f"the model's chat template does not take these messages: {error}") from error
        check_text(text, "the chat")
        return str(text)

    def cut(self, text: str) -> CutText:
        """A text in tokens."""
        with self._lock:
            if not getattr(self._tokenizer, "is_fast", False):
                return CutText(token_ids(self._tokenizer(text, add_special_tokens=False)["input_ids"]), None)
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in encoding["offset_mapping"]]
            return CutText(token_ids(encoding["input_ids"]), ends)

    def plain(self, text: str) -> list[int]:
        """Tokens of a text that follows something else."""
        with self._lock:
            return ids_of(self._tokenizer, text)

    def said(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """What generated tokens write behind others, special tokens included."""
        head = list(before[-_CONTEXT:])
        with self._lock:
            start = self._decode(head)
            whole = self._decode([*head, *tokens])
        return whole[len(start) :] if whole.startswith(start) else whole

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def common(self, before: Sequence[int], tokens: Sequence[int], text: str, start: int) -> tuple[int, int]:
        """How many of the tokens that were generated behind others the text has from `start` on, and where they end."""
        said = self.said(before, tokens)
        if text.startswith(said, start):
            return len(tokens), start + len(said)
        least, most = 0, len(tokens)
        while most - least > 1:
            middle = (least + most) // 2
            if text.startswith(self.said(before, tokens[:middle]).rstrip(_PART), start):
                least = middle
            else:
                most = middle
        said = self.said(before, tokens[:least])
        while least and said.endswith(_PART):
            least -= 1
            said = self.said(before, tokens[:least])
        return least, start + len(said)
