"""From what stands on the command line to a prompt's tokens, and whose chunks they would be."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cakekv.errors import BadInput
from cakekv.store.base import Store

Document = Annotated[
    str | None, typer.Option(help="A text file, or demo for the document that `cakekv ask` asks about by default.")
]
Tokens = Annotated[
    Path | None, typer.Option(help="A file with token ids: numbers with spaces or commas between them, or a JSON list.")
]
Question = Annotated[
    str | None, typer.Option(help="Asked about the document. [default: none; what all questions share is looked for]")
]
Model = Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")]
Tenant = Annotated[str, typer.Option(help="As in `cakekv ask`.")]
Codec = Annotated[str, typer.Option(help="As in `cakekv ask`.")]
ChunkTokens = Annotated[int | None, typer.Option(min=1, help="Tokens per chunk. [default: 64]")]
IdentityRoot = Annotated[
    str | None,
    typer.Option(
        "--identity", help="Beginning of an identity that `cakekv store stats` shows: no model is loaded then."
    ),
]


class Prompt(NamedTuple):
    """A prompt's tokens, and the identity of whoever would ask for its chunks."""

    token_ids: list[int]
    root: bytes
    fields: Mapping[str, str]
    window: int = 0
    """Newest tokens of a prompt whose chunks are not used in the codec's lossy form."""


def find_prompt(
    store: Store,
    document: str | None,
    tokens: Path | None,
    *,
    question: str | None = None,
    model: str = "demo",
    tenant: str = "",
    codec: str = "raw",
    chunk_tokens: int | None = None,
    identity: str | None = None,
) -> Prompt:
    """Read or make the tokens, and find out the identity.

    Raises
    ------
    BadInput
        Not exactly one of document and tokens is given, one cannot be read, or no identity begins so.
    """
    if (document is None) == (tokens is None):
        raise BadInput("give the prompt as --document FILE or as --tokens FILE")
    if identity is not None:
        if tokens is None:
            raise BadInput("with --identity no model is loaded that could cut a document into tokens: give --tokens")
        root, fields = _noted(store, identity)
        return Prompt(read_tokens(tokens), root, fields)

    from cakekv.cli.model import load_cake

    with load_cake(model, None, tenant, codec, chunk_tokens) as cake:
        token_ids = read_tokens(tokens) if tokens is not None else _document_tokens(cake.tokenizer, document, question)
        return Prompt(token_ids, cake.identity.root, cake.identity.fields(), cake.codec.window)


def read_tokens(file: Path) -> list[int]:
    """Token ids in a file.

    Raises
    ------
    BadInput
        It cannot be read, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the tokens in {file}: {error}") from error
    try:
        token_ids = [int(token) for token in text.strip().strip("[]").replace(",", " ").split()]
    except ValueError as error:
        raise BadInput(f"{file} should hold token ids, such as 1, 15, 7; {error}") from error
    if not token_ids:
        raise BadInput(f"there are no tokens in {file}")
    return token_ids


def _document_tokens(tokenizer: object, document: str | None, question: str | None) -> list[int]:
    from cakekv.demo.document import DEMO_TOKENS, document_prompt, read_document

    assert document is not None
    text = read_document(document, tokenizer, DEMO_TOKENS if document == "demo" else None)
    if question is not None:
        return document_prompt(tokenizer, text, question)
    one, other = (document_prompt(tokenizer, text, question) for question in ("What?", "Who is it?"))
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _noted(store: Store, beginning: str) -> tuple[bytes, dict[str, str]]:
    found = {root: fields for root, fields in store.identities().items() if root.startswith(beginning.lower())}
    if len(found) != 1:
        raise BadInput(
            f"{len(found)} identities begin with {beginning!r}; `cakekv store stats` shows those that there are"
        )
    [(root, fields)] = found.items()
    return bytes.fromhex(root), fields
