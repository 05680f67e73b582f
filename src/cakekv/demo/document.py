"""Long documents with a question: by default CPython's language reference, which every Python carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cakekv.errors import BadInput, CakeError
from cakekv.prompt import Document

TOPICS = (
    "objects",
    "execmodel",
    "exceptions",
    "try",
    "raise",
    "context-managers",
    "truth",
    "booleans",
    "function",
    "class",
    "import",
    "types",
)
"""Topics of the demo's document, in order. Those that a Python version does not have are passed over."""
CLOSING_TOPIC = "with"
"""Its end, which the question is about: a model this small does not find much in the midst of 7,000 tokens."""
QUESTION = 'According to the language reference above, what is the "with" statement used for? Answer in one sentence.'
DEMO_TOKENS = 7000
SEPARATOR = "\n\n\n"
_HERE = "[cakekv: here are the documents]"


def read_document(name: str, tokenizer: Any, tokens: int | None = None) -> str:
    """A document's text.

    Parameters
    ----------
    name : str
        "demo" for the language reference, or a text file in UTF-8.
    tokenizer : transformers tokenizer
        Counts the tokens.
    tokens : int or None
        Longest text, in tokens: of a file the beginning, in whole paragraphs; of the language reference as many whole
        topics as fit. None for all (some 20,000 tokens of the language reference).

    Raises
    ------
    BadInput
        The file cannot be read, is not text, or is empty; or no topic is so short.
    CakeError
        This Python lacks its own documentation.
    """
    if name == "demo":
        return _language_reference(tokenizer, tokens)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read the document {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"the document {name!r} is not text in UTF-8: {error}") from error
    if not text.strip():
        raise BadInput(f"the document {name!r} is empty")
    return text if tokens is None else _beginning(tokenizer, text, tokens)


def _language_reference(tokenizer: Any, tokens: int | None) -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions split it off
        raise CakeError("this Python lacks pydoc_data, where the demo's document is; give --document FILE") from error
    closing = topics[CLOSING_TOPIC].strip()
    left = math.inf if tokens is None else tokens - count_tokens(tokenizer, closing)
    if left < 0:
        raise BadInput(f"the demo's document has at least {count_tokens(tokenizer, closing)} tokens, not {tokens}")
    chosen = []
    for name in TOPICS:
        text = topics.get(name, "").strip() + SEPARATOR
        length = count_tokens(tokenizer, text)
        if name in topics and length <= left:
            chosen.append(text)
            left -= length
    return "".join([*chosen, closing])


def _beginning(tokenizer: Any, text: str, tokens: int) -> str:
    """Whole paragraphs of at most so many tokens; of a single longer one, its beginning."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(token_ids) <= tokens:
        return text
    head: str = tokenizer.decode(token_ids[:tokens], clean_up_tokenization_spaces=False)
    return head.rpartition("\n\n")[0] or head


def count_tokens(tokenizer: Any, text: str) -> int:
    """Length of a text in tokens."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def document_prompt(tokenizer: Any, document: str, question: str) -> list[int]:
    """Token ids of a prompt with the question last, so that all questions about a document share its prefix.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is used if it has one.
    document, question : str
        The two parts.
    """
    text = f"{document}\n\n{question}"
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return [int(token) for token in tokenizer(f"{text}\n")["input_ids"]]


def prompt_parts(tokenizer: Any, documents: Sequence[str], question: str) -> list[Any]:
    """A prompt's parts: documents that can be reused, and the question last.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is used if it has one.
    documents : sequence of str
        Their texts.
    question : str
        About them.
    """
    parts: list[Any] = [as_part(document) for document in documents]
    if not tokenizer.chat_template:
        return [*parts, f"{question}\n"]
    turns = [{"role": "user", "content": f"{_HERE}{question}"}]
    head, _, tail = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).partition(_HERE)
    plain = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (head, tail))  # the template has a BOS
    before, behind = ([int(token) for token in tokens] for tokens in plain)
    return [before, *parts, behind]


def as_part(document: str) -> Document:
    """A document as it stands in prompts, and is learned."""
    return Document(f"{document}\n\n")
