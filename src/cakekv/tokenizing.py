"""Text to tokens and back, for several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cakekv.errors import BadInput


class Tokenizing:
    """A tokenizer of transformers; they are not made for several threads.

    Parameters
    ----------
    tokenizer : transformers tokenizer or None
        None: prompts are token ids, and answers have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's token ids.

        Raises
        ------
        BadInput
            It is text, and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self._tokenizer is None:
            raise BadInput("the prompt is text, but there is no tokenizer: pass one to Cake, or give token ids")
        with self._lock:
            return [int(token) for token in self._tokenizer(prompt)["input_ids"]]

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer says; empty if there is no tokenizer."""
        if self._tokenizer is None:
            return ""
        with self._lock:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def pieces(self, answer: Iterable[int]) -> Iterator[str]:
        """The text of an answer, as its tokens come."""
        tokens: list[int] = []
        shown = ""
        for token in answer:
            tokens.append(token)
            text = self.text(tokens)
            if not text.endswith("\ufffd"):  # a character may take several tokens
                yield text[len(shown) :]
                shown = text
