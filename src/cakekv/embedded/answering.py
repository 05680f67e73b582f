"""An answer's text, piece by piece as its tokens come, up to the first stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cakekv.engine.choice import Choice
from cakekv.results import FinishReason

_PART = "\ufffd"
"""Stands for a character of which tokens are missing."""
_WINDOW, _CONTEXT = 64, 8
"""Tokens that are decoded anew for each token at most, and those of them that were before the text that is awaited."""


class Piece(NamedTuple):
    """What came next of an answer."""

    text: str
    choices: tuple[Choice, ...]
    """The tokens whose text ends in this piece."""
    finish_reason: FinishReason | None = None
    """Set in the last piece, which may be empty."""


class Answering:
    """Collects the tokens of an answer, and hands out what is sure to be in it.

    Text that may become a stop text is held back, and so are tokens whose text is not handed out to its end.

    Parameters
    ----------
    decode : callable or None
        Text of tokens; None if nobody wants text.
    stops : sequence of str
        Texts that end the answer; they are not in it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str] | None, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._anchor = self._shown = 0
        """Where the decoded window begins, in tokens, and what of its text is known, in characters."""
        self._length = 0
        """Of the known text, in characters."""
        self._held = ""
        """Known, and not handed out."""
        self._waiting: deque[tuple[Choice, int]] = deque()
        """Tokens that were not handed out, with the length of the text as each of them left it."""
        self._given = self._given_length = 0
        """Tokens that were handed out, and the length of their text."""
        self._told = 0
        self.stopped = False
        """Whether a stop text came."""

    def sure(self, computed: int) -> list[int]:
        """Those of the first so many tokens that were handed out, each once."""
        end = max(self._told, min(computed, self._given))
        told, self._told = self._tokens[self._told : end], end
        return told

    def add(self, choice: Choice) -> Piece:
        """The next token."""
        self._tokens.append(choice.token)
        if self._decode is None:
            self._given += 1
            return Piece("", (choice,))
        new = self._new_text(final=False)
        self._waiting.append((choice, self._length))
        return self._give(new)

    def end(self, reason: FinishReason) -> Piece:
        """There are no more tokens."""
        if self.stopped or self._decode is None:
            return Piece("", (), "stop" if self.stopped else reason)
        piece = self._give(self._new_text(final=True), final=True)
        if self.stopped:
            return piece._replace(finish_reason="stop")
        rest = tuple(choice for choice, _ in self._waiting)
        self._given += len(rest)
        self._waiting.clear()
        return Piece(piece.text, piece.choices + rest, reason)

    def _new_text(self, final: bool) -> str:
        assert self._decode is not None
        window = self._decode(self._tokens[self._anchor :])
        whole = len(window if final else window.rstrip(_PART))  # a character may take several tokens
        new = window[self._shown : whole]
        self._shown = max(self._shown, whole)
        self._length += len(new)
        if len(self._tokens) - self._anchor >= _WINDOW and whole == len(window):
            context = self._decode(self._tokens[-_CONTEXT:])
            if context and window.endswith(context):
                self._anchor, self._shown = len(self._tokens) - _CONTEXT, len(context)
        return new

    def _give(self, new: str, final: bool = False) -> Piece:
        """Hand out what cannot be a part of a stop text."""
        self._held += new
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
        keep = len(self._held) if found is None else found
        if found is None and not final:
            keep -= max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[:keep], self._held[keep:]
        return Piece(text, tuple(self._given_up_to(self._length - len(self._held))))

    def _given_up_to(self, length: int) -> Iterator[Choice]:
        """The tokens whose text ends there, or before; those without a text of their own wait for the next."""
        last = 0
        for number, (_, end) in enumerate(self._waiting, start=1):
            if self._given_length < end <= length:
                last, self._given_length = number, end
        for _ in range(last):
            self._given += 1
            yield self._waiting.popleft()[0]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text is how a stop text begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
