"""Texts that come with every Python, for `cakekv codec learn`: none of those that `cakekv quality` judges by.

The judge reads the language reference's topics from A on, the modules at the top of the standard library, and records
of one kind. Here are topics from the end, modules of its packages, and records of another kind.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cakekv.errors import BadInput, CakeError
from cakekv.prompt import ids_before_every_text, ids_of

_NAMES = ("Zoe", "Yuri", "Xaver", "Wanda", "Viktor", "Ursula", "Tilda", "Sven")
_PACKAGES = ["asyncio", "concurrent", "email", "html", "http", "importlib", "json", "logging", "multiprocessing"]
_PACKAGES += ["sqlite3", "unittest", "urllib", "wsgiref", "xml", "zipfile"]


def learning_texts(tokenizer: Any, count: int, tokens: int, folder: Path | None = None) -> Iterator[list[int]]:
    """The same texts wherever Python and tokenizer are the same; the kinds take turns.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The model's.
    count, tokens : int
        How many, and how long each is.
    folder : Path or None
        A folder with .txt files, which become one kind more.

    Raises
    ------
    BadInput
        There is not enough text.
    CakeError
        This Python lacks its own documentation.
    """
    kinds = [_topics(), _modules(), _records()]
    if folder is not None:
        kinds.append(file.read_text("utf-8", "replace") for file in sorted(folder.rglob("*.txt")))
    bos = ids_before_every_text(tokenizer)
    for number in range(count):
        kind, text = kinds[number % len(kinds)], list(bos)
        while len(text) < tokens:
            piece = next(kind, None)
            if piece is None:
                raise BadInput(f"there is not enough text for {count} documents of {tokens} tokens: ask for fewer")
            text += ids_of(tokenizer, piece + "\n\n")
        yield text[:tokens]


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CakeError("this Python lacks pydoc_data, which texts are made from") from error
    yield from (topics[name] for name in sorted(topics, reverse=True) if len(topics[name]) > 2000)


def _modules() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for package in _PACKAGES for file in sorted((library / package).glob("[a-z]*.py"))]
    random.Random(1).shuffle(files)
    yield from (file.read_text("utf-8", "replace") for file in files)


def _records() -> Iterator[str]:
    """Made-up orders, without end."""
    rng = random.Random(99)
    while True:
        yield "\n".join(
            f"{rng.choice(_NAMES)} ordered {rng.randrange(1, 90)} boxes on day {rng.randrange(1, 365)}, invoice "
            f"{rng.randrange(10000, 100000)}, total {rng.randrange(100, 100000) / 100}."
            for _ in range(20)
        )
