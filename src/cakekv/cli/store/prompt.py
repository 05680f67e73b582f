"""From what stands on the command line to a prompt's tokens, and whose chunks they would be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.errors import BadInput
from cakekv.store.base import Store


class Prompt(NamedTuple):
    """A prompt's tokens, and the identity of whoever would ask for its chunks."""

    token_ids: list[int]
    root: bytes
    fields: Mapping[str, str]
    window: int = 0
    """Newest tokens of a prompt whose chunks are not used in the codec's lossy form."""


@dataclass(frozen=True)
class PromptOptions:
    """The options that say which prompt a command is about; `about_a_prompt` gives them to it."""

    document: Annotated[
        str | None, typer.Option(help="A text file, or demo for the document that `cakekv ask` asks about by default.")
    ] = None
    tokens: Annotated[
        Path | None,
        typer.Option(help="A file with token ids: numbers with spaces or commas between them, or a JSON list."),
    ] = None
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo"
    question: Annotated[
        str | None,
        typer.Option(help="Asked about the document. [default: none; what all questions share is looked for]"),
    ] = None
    tenant: Annotated[str, typer.Option(help="As in `cakekv ask`.")] = ""
    codec: Annotated[str, typer.Option(help="As in `cakekv ask`.")] = "raw"
    compress: Annotated[str | None, typer.Option(help="As in `cakekv ask`.")] = None
    chunk_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per chunk. [default: 64]")] = None
    identity: Annotated[
        str | None,
        typer.Option(help="Beginning of an identity that `cakekv store stats` shows: no model is loaded then."),
    ] = None

    @property
    def names_one(self) -> bool:
        """Whether they say anything of a prompt."""
        return self.document is not None or self.tokens is not None

    def find(self, store: Store) -> Prompt:
        """Read or make the tokens, and find out the identity.

        Raises
        ------
        BadInput
            Not exactly one of document and tokens is given, one cannot be read, or no identity begins so.
        """
        if (self.document is None) == (self.tokens is None):
            raise BadInput("give the prompt as --document FILE or as --tokens FILE")
        if self.identity is not None:
            if self.tokens is None:
                raise BadInput(
                    "with --identity no model is loaded that could cut a document into tokens: give --tokens"
                )
            root, fields = _noted(store, self.identity)
            return Prompt(read_tokens(self.tokens), root, fields)

        from cakekv.cli.model import load_cake

        with load_cake(self.model, None, self.tenant, self.codec, self.chunk_tokens, compress=self.compress) as cake:
            if self.tokens is not None:
                token_ids = read_tokens(self.tokens)
            else:
                token_ids = _document_tokens(cake.tokenizer, self.document, self.question)
            return Prompt(token_ids, cake.identity.root, cake.identity.fields(), cake.codec.window)


def about_a_prompt(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `prompt` is a `PromptOptions`, which gets an option for each of its fields instead."""
    own = inspect.signature(command, eval_str=True)
    options = inspect.signature(PromptOptions, eval_str=True).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        prompt = PromptOptions(**{name: given.pop(name) for name in options})
        command(prompt=prompt, **given)

    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += options.values() if parameter.name == "prompt" else [parameter]
    run.__signature__ = own.replace(  # type: ignore[attr-defined]  # which typer reads
        parameters=[parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run


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
