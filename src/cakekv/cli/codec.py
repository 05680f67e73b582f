"""cakekv codec"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cakekv.cli.console import NEWS, RESULTS

app = typer.Typer(no_args_is_help=True, help="Prepare codecs that have to learn a model first.")


@app.callback()
def codec() -> None:
    """Prepare codecs that have to learn a model first."""


@app.command()
def learn(
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    documents: Annotated[int, typer.Option(min=1, help="From how many documents; their kinds take turns.")] = 12,
    tokens: Annotated[int, typer.Option(min=64, help="Length of each, in tokens.")] = 1024,
    texts: Annotated[Path | None, typer.Option(help="A folder with .txt files: one kind of documents more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the basis here, too.")] = None,
    dtype: Annotated[
        str, typer.Option(help="What to run the model in, such as float32; auto: what it was saved in.")
    ] = "auto",
    share: Annotated[
        str | None, typer.Option(help="With so many layers shared, as they are to be used; see cakekv share calibrate.")
    ] = None,
) -> None:
    """Learn a model's basis for the codec kvtc, once per model: in which directions its keys and values vary, and how
    much errors in each would change what it says.

    It is kept beside the calibration ($CAKEKV_CACHE/kvtc, or ~/.cache/cakekv/kvtc) under the fingerprints of the
    model's weights, where Cake(..., codec="kvtc") and vLLM find it; copy that folder to other machines. Its digest is
    part of every key: chunks stored with another basis are not found. The texts come with Python, and are none of those
    that cakekv quality judges by.

    Examples:

        cakekv codec learn

        cakekv codec learn --model ./my-model --texts ./my-documents
    """
    from rich.progress import track

    from cakekv.cli.model import load_cake
    from cakekv.codec.basis import Basis, basis_file, write_basis
    from cakekv.codec.learning import learn as learn_from
    from cakekv.codec.texts import learning_texts
    from cakekv.engine.sensitivity import look_at

    cake = load_cake(model, None, dtype=dtype, share=share)
    engine, length = cake.engine, min(tokens, cake.engine.max_context)
    read = list(learning_texts(cake.tokenizer, documents, length, texts))
    shown = track(enumerate(read), "Learning", total=len(read), console=NEWS, transient=True)
    basis = learn_from(look_at(engine, text, length // 4, number) for number, text in shown)  # type: ignore[arg-type]
    data = basis.to_bytes()
    files = [basis_file(name) for name in engine.weights_names()] + ([out] if out else [])
    write_basis(data, files)
    RESULTS.print(f"basis {Basis.from_bytes(data).digest}: {len(data):,} bytes, from {len(read)} documents")
    for file in files:
        RESULTS.print(str(file))
