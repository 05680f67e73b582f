"""Text to tokens and back, for several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cakekv.errors import BadInput
from cakekv.prompt import Prompt, check_text, token_ids


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

    def tokens(self, prompt: Prompt, notes: list[str]) -> list[int]:
        """A prompt's token ids; what should be known about them is noted.

        Raises
        ------
        BadInput
            It is text, and there is no tokenizer; or it is no prompt.
        """
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if self._tokenizer is None:
            raise BadInput("the prompt is text, but there is no tokenizer: pass one to Cake, or give token ids")
        check_text(prompt, "the prompt")
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

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer says; empty if there is no tokenizer."""
        if self._tokenizer is None:
            return ""
        with self._lock:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def pieces(self, answer: Iterable[int]) -> Iterator[str]:
        """The text of an answer, as its tokens come."""
        tokens: list[int] = []
        text, shown = "", 0
        for token in answer:
            tokens.append(token)
            text = self.text(tokens)
            whole = len(text.rstrip("\ufffd"))  # a character may take several tokens
            if whole > shown:
                yield text[shown:whole]
                shown = whole
        if len(text) > shown:
            yield text[shown:]
