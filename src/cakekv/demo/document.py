"""Long documents with a question: by default CPython's own language reference, which every Python carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cakekv.errors import BadInput, CakeError

TOPICS = (
    "objects",
    "execmodel",
    "exceptions",
    "with",
    "try",
    "raise",
    "context-managers",
    "truth",
    "booleans",
    "function",
    "class",
    "import",
    "types",
    "specialnames",
)
"""Topics of the demo's document, in order. Those that a Python version does not have are passed over."""
QUESTION = 'In one sentence, what is the "with" statement used for?'
DEMO_TOKENS = 7000


def read_document(name: str) -> str:
    """A document's text.

    Parameters
    ----------
    name : str
        "demo" for the language reference (some 40,000 tokens), or a text file in UTF-8.

    Raises
    ------
    BadInput
        The file cannot be read, is not text, or is empty.
    """
    if name == "demo":
        return language_reference()
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read the document {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"the document {name!r} is not text in UTF-8: {error}") from error
    if not text.strip():
        raise BadInput(f"the document {name!r} is empty")
    return text


def language_reference() -> str:
    """Whole topics of Python's language reference, one after the other."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions split it off
        raise CakeError("this Python lacks pydoc_data, where the demo's document is; give --document FILE") from error
    return "\n\n\n".join(topics[name].strip() for name in TOPICS if name in topics)


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a text: whole paragraphs of at most so many tokens."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(token_ids) <= tokens:
        return text
    head: str = tokenizer.decode(token_ids[:tokens], clean_up_tokenization_spaces=False)
    return head.rpartition("\n\n")[0] or head


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
