"""Prompts as retrieval makes them: several documents, then questions, some of which take one and some two documents."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cakekv.bench.quality.documents import Document, Needle, make_documents, make_needle
from cakekv.errors import BadInput

_KEEPERS = (
    "Nadia",
    "Oscar",
    "Paula",
    "Quentin",
    "Rosa",
    "Stefan",
    "Tilda",
    "Ulrich",
    "Vera",
    "Walter",
    "Xenia",
    "Yusuf",
)
_THINGS = (
    *("silver crown", "green lantern", "old compass", "iron kettle", "paper globe", "red violin"),
    *("stone owl", "glass ship", "broken clock", "black piano", "golden mask", "wooden horse"),
)
MOST_DOCUMENTS = 2 * len(_KEEPERS)


class RagPrompt(NamedTuple):
    """A prompt of documents, and what is asked behind it."""

    parts: list[list[int]]
    """The documents' tokens."""
    whole: Document
    """All of them as one context, what follows the last one in its text, and the needles of all."""


class Pair(NamedTuple):
    """A fact that takes two documents: one says who keeps what, the other one what its code is."""

    keeper: str
    thing: str
    code: str
    documents: tuple[int, int]
    """Which of the prompt's say the one and the other."""

    @property
    def sentences(self) -> tuple[str, str]:
        """What each of the two documents says."""
        return f"{self.keeper} keeps the {self.thing}.", f"The secret code of the {self.thing} is {self.code}."

    def needle(self, tokenizer: Any) -> Needle:
        """What is asked."""
        return make_needle(tokenizer, f"the secret code of what {self.keeper} keeps is", self.code, documents=2)


def make_prompts(
    tokenizer: Any,
    count: int,
    documents: Sequence[int],
    tokens: int,
    continuation_tokens: int,
    texts: Path | None = None,
) -> list[RagPrompt]:
    """The same prompts wherever Python and tokenizer are the same; more of them begin with the fewer.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The model's.
    count : int
        How many.
    documents : sequence of int
        How many documents a prompt has; the numbers take turns.
    tokens, continuation_tokens : int
        Of each document, and of what follows the last one.
    texts : Path or None
        A folder with text files, as for `make_documents`.

    Raises
    ------
    BadInput
        A prompt would have too few or too many documents, or as `make_documents`.
    """
    for number in documents:
        if not 2 <= number <= MOST_DOCUMENTS:
            raise BadInput(f"a prompt for judging reuse has 2 to {MOST_DOCUMENTS} documents, not {number}")
    numbers = [documents[prompt % len(documents)] for prompt in range(count)]
    pairs = [_pairs(random.Random(prompt), number) for prompt, number in enumerate(numbers)]
    facts = [_said(each, number) for each, prompt in zip(pairs, numbers, strict=True) for number in range(prompt)]
    made = iter(make_documents(tokenizer, sum(numbers), tokens, continuation_tokens, texts, facts, paragraphs=True))
    return [
        make_prompt(list(islice(made, number)), [pair.needle(tokenizer) for pair in each])
        for number, each in zip(numbers, pairs, strict=True)
    ]


def make_prompt(documents: Sequence[Document], more: Iterable[Needle] = ()) -> RagPrompt:
    """A prompt of these documents that asks for a fact of each, if no other document says as much of the same name.

    Parameters
    ----------
    documents : sequence of Document
        In their order.
    more : iterable of Needle
        What is asked behind that.
    """
    names = Counter(needle.question for document in documents for needle in document.needles)
    needles: list[Needle] = []
    for document in documents:
        needles += [needle for needle in document.needles if names[needle.question] == 1][:1]
    context = [token for document in documents for token in document.context]
    last = documents[-1]
    whole = Document(last.kind, context, last.continuation, [*needles, *more])
    return RagPrompt([document.context for document in documents], whole)


def _pairs(rng: random.Random, documents: int) -> list[Pair]:
    """Every document says half of a fact, but for one of an odd number."""
    count = documents // 2
    places = rng.sample(range(documents), 2 * count)
    return [
        Pair(keeper, thing, str(rng.randrange(10000, 100000)), (places[2 * number], places[2 * number + 1]))
        for number, (keeper, thing) in enumerate(
            zip(rng.sample(_KEEPERS, count), rng.sample(_THINGS, count), strict=True)
        )
    ]


def _said(pairs: Iterable[Pair], document: int) -> list[str]:
    """The halves of facts that one document says."""
    return [
        sentence
        for pair in pairs
        for at, sentence in zip(pair.documents, pair.sentences, strict=True)
        if at == document
    ]
