"""Documents of several kinds that come with every Python, each with needles in it."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cakekv.errors import BadInput, CakeError
from cakekv.prompt import ids_before_every_text, ids_of

KINDS = ("reference", "source", "records")
NEEDLES = 3
_NAMES = ("Alma", "Boris", "Clara", "Diego", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis")


@dataclass(frozen=True)
class Needle:
    """A fact in a document's context.

    Attributes
    ----------
    question, answer : tuple of int
        Token ids; a model that has found the fact continues the first with the second.
    documents : int
        How many documents it takes to answer.
    """

    question: tuple[int, ...]
    answer: tuple[int, ...]
    documents: int = 1


@dataclass(frozen=True)
class Document:
    """What quality is judged on.

    Attributes
    ----------
    kind : str
        One of `KINDS`, or "text".
    context : list of int
        The tokens whose keys and values are encoded, BOS first where the tokenizer puts it first.
    continuation : list of int
        The tokens that follow.
    needles : list of Needle
        Facts of the context.
    """

    kind: str
    context: list[int]
    continuation: list[int]
    needles: list[Needle]

    @property
    def tail(self) -> list[int]:
        """What is asked of a model behind the context: the continuation, then all needles with their answers."""
        return self.continuation + [token for needle in self.needles for token in (*needle.question, *needle.answer)]


def make_documents(
    tokenizer: Any,
    count: int,
    context_tokens: int,
    continuation_tokens: int,
    texts: Path | None = None,
    facts: Sequence[Sequence[str]] = (),
    paragraphs: bool = False,
) -> list[Document]:
    """The same documents wherever Python and tokenizer are the same; the kinds take turns.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The model's.
    count : int
        How many.
    context_tokens, continuation_tokens : int
        Their lengths.
    texts : Path or None
        A folder with text files, which become one kind more.
    facts : sequence of sequence of str
        Further sentences of each document, behind those of its own needles.
    paragraphs : bool
        Whether a document begins with the next paragraph of a text, instead of with the next text: so there is more.

    Raises
    ------
    BadInput
        A document would be too short for its needles, or there is nothing in the folder.
    CakeError
        This Python lacks its own documentation.
    """
    if context_tokens < 256:
        raise BadInput(f"a document for judging quality has at least 256 tokens, not {context_tokens}")
    sources = {kind: _texts(kind, texts) for kind in (*KINDS, *(["text"] if texts else []))}
    if paragraphs:
        sources = {kind: (part for text in each for part in text.split("\n\n")) for kind, each in sources.items()}
    bos = ids_before_every_text(tokenizer)
    rng = random.Random(20240)
    documents = []
    for number in range(count):
        kind = list(sources)[number % len(sources)]
        wanted = context_tokens + continuation_tokens
        tokens = list(bos)
        while len(tokens) < wanted:
            piece = next(sources[kind], None)
            if piece is None:
                raise BadInput(
                    f"there is not enough text of the kind {kind!r} for {count} documents of {wanted} tokens"
                )
            tokens += ids_of(tokenizer, piece + "\n\n")
        more = facts[number] if facts else ()
        documents.append(_document(tokenizer, kind, tokens, context_tokens, continuation_tokens, rng, more))
    return documents


def make_needle(tokenizer: Any, question: str, answer: str, documents: int = 1) -> Needle:
    """What is asked behind a context, "As said above, …", and its answer, cut where the question's tokens end."""
    question = f"\n\nAs said above, {question}"
    whole, begin = ids_of(tokenizer, f"{question} {answer}"), len(ids_of(tokenizer, question))
    return Needle(tuple(whole[:begin]), tuple(whole[begin:]), documents)


def _document(
    tokenizer: Any,
    kind: str,
    tokens: list[int],
    context_tokens: int,
    continuation_tokens: int,
    rng: random.Random,
    more: Sequence[str],
) -> Document:
    """Put needles into a text, and more sentences, at even distances."""
    needles, facts = [], []
    for name in rng.sample(_NAMES, NEEDLES):
        code = str(rng.randrange(10000, 100000))
        facts.append(ids_of(tokenizer, f"\nThe secret code of {name} is {code}.\n"))
        needles.append(make_needle(tokenizer, f"the secret code of {name} is", code))
    facts += [ids_of(tokenizer, f"\n{sentence}\n") for sentence in more]
    room, parts = context_tokens - sum(map(len, facts)), len(facts) + 1
    context: list[int] = []
    for depth, fact in enumerate(facts):
        begin, end = (room * at // parts for at in (depth, depth + 1))
        context += tokens[begin:end] + fact
    context += tokens[room * (parts - 1) // parts : room]
    return Document(kind, context, tokens[room : room + continuation_tokens], needles)


def _texts(kind: str, folder: Path | None) -> Iterator[str]:
    if kind == "reference":
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise CakeError("this Python lacks pydoc_data, which documents are made from") from error
        yield from (topics[name] for name in sorted(topics) if len(topics[name]) > 2000)
    elif kind == "source":
        library = Path(sysconfig.get_path("stdlib"))
        yield from (file.read_text("utf-8", "replace") for file in sorted(library.glob("[a-z]*.py")))
    elif kind == "records":
        yield from _records()
    else:
        files = sorted(file for file in folder.rglob("*.txt")) if folder else []
        if not files:
            raise BadInput(f"there are no .txt files in {folder}")
        yield from (file.read_text("utf-8", "replace") for file in files)


def _records() -> Iterator[str]:
    """Made-up lists of keys and values, without end."""
    rng = random.Random(7)
    places = ("shelf", "drawer", "crate", "locker", "cabinet")
    while True:
        yield "\n".join(
            f"Item {rng.randrange(1000, 10000)}: {rng.choice(places)} {rng.randrange(1, 60)}, weight "
            f"{rng.randrange(1, 900) / 10} kg, owner {rng.choice(_NAMES)}, due on day {rng.randrange(1, 365)}."
            for _ in range(20)
        )
