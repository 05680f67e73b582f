"""cakekv store learn"""

from __future__ import annotations

from typing import Annotated

import typer

from cakekv.cli.console import EXIT_FAILED, NEWS, print_json
from cakekv.cli.store.opened import Json, Url, say
from cakekv.demo.document import DEMO_TOKENS, as_part, read_document
from cakekv.store.opening import open_store


def learn(
    store: Url,
    documents: Annotated[
        list[str], typer.Option("--document", help="A text file, or demo; may be given several times.")
    ],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    tenant: Annotated[str, typer.Option(help="As in `cakekv ask`.")] = "",
    codec: Annotated[str, typer.Option(help="As in `cakekv ask`.")] = "raw",
    compress: Annotated[str | None, typer.Option(help="As in `cakekv ask`.")] = None,
    as_json: Json = False,
) -> None:
    """Compute documents by themselves and save them, so that prompts can reuse them wherever they stand.

    `cakekv ask --reuse` does that by itself for documents that it meets for the first time.

    Examples:

        cakekv store learn /var/cache/kv --document contract.txt --document letter.txt --model path/to/model
    """
    from cakekv.cli.model import load_cake

    rows = []
    with open_store(store) as found, load_cake(model, found, tenant, codec, compress=compress) as cake:
        for name in documents:
            text = read_document(name, cake.tokenizer, DEMO_TOKENS if name == "demo" else None)
            with NEWS.status(f"Computing {name} …"):
                report = cake.learn(as_part(text))
            rows.append({"document": name, "tokens": report.prompt_tokens, "computed_tokens": report.computed_tokens})
        with NEWS.status("Saving what was computed …"):
            saved = cake.wait_saved()
    if as_json:
        print_json({"documents": rows, "failed_chunks": saved.failed_chunks, "error": saved.error})
    else:
        for row in rows:
            say(f"{row['document']}: {row['tokens']:,} tokens, {row['computed_tokens']:,} of them computed")
        if saved.error:
            say(f"{saved.failed_chunks} chunks could not be saved: {saved.error}")
    if saved.error:
        raise typer.Exit(EXIT_FAILED)
