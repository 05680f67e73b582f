"""The contract of a task of SCBench in miniature: it writes long contexts with questions, and judges answers.

A task is one file. The shortest is `kv`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from cakekv.errors import BadInput
from cakekv.prompt import ids_before_every_text, ids_of

TURNS = 5
SHOTS = 2
"""Questions that are answered at the end of the context, so that the first turn knows the form, too."""
END = "\n"
"""Ends every answer."""


class Question(NamedTuple):
    """What is asked, up to where the answer begins, and the gold answer, between which is a space."""

    text: str
    answer: str


class Written(NamedTuple):
    """A context and questions about it, all different."""

    context: str
    questions: Sequence[Question]
    """`SHOTS` + `TURNS` of them."""


class Turn(NamedTuple):
    """A question and its gold answer as token ids, neither with `END`, and the latter as text."""

    question: list[int]
    answer: list[int]
    gold: str


@dataclass(frozen=True)
class Session:
    """A context and the questions about it, as token ids.

    Attributes
    ----------
    task : str
        Its name.
    context : list of int
        BOS first where the tokenizer puts it first.
    turns : list of Turn
        `TURNS` of them.
    end : list of int
        `END`.
    """

    task: str
    context: list[int]
    turns: list[Turn]
    end: list[int]


class Task(ABC):
    """A kind of sessions."""

    name: ClassVar[str]
    most: ClassVar[int]
    """An answer has at most so many tokens."""

    @abstractmethod
    def write(self, rng: random.Random, entries: int) -> Written:
        """A session whose context has so many entries, or a few more if it needs them."""

    @abstractmethod
    def score(self, said: str, gold: str) -> float:
        """How good an answer is, 0 to 1."""

    def session(self, tokenizer: Any, number: int, tokens: int) -> Session:
        """The session of this number, whose context has as many entries as fit into so many tokens.

        The same wherever tokenizer, number and length are the same.

        Raises
        ------
        BadInput
            Not even the fewest entries fit.
        """
        before = ids_before_every_text(tokenizer)

        def written(entries: int) -> tuple[list[int], Sequence[Question]]:
            context, questions = self.write(random.Random(f"{self.name} {number}"), entries)
            shots = "".join(f"{question.text} {question.answer}{END}" for question in questions[:SHOTS])
            return before + ids_of(tokenizer, f"{context}\n\n{shots}"), questions[SHOTS:]

        entries = bisect_right(range(1, tokens), tokens, key=lambda entries: len(written(entries)[0]))
        if not entries:
            raise BadInput(f"no session of {self.name} fits into {tokens} tokens: judge longer ones")
        context, questions = written(entries)
        turns = []
        for text, answer in questions:
            whole, begin = ids_of(tokenizer, f"{text} {answer}"), len(ids_of(tokenizer, text))
            turns.append(Turn(whole[:begin], whole[begin:], answer))
        return Session(self.name, context, turns, ids_of(tokenizer, END))
