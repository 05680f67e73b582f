"""cakekv less"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cakekv.cli.console import NEWS, RESULTS

Model = Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")]
Texts = Annotated[Path | None, typer.Option(help="A folder with .txt files: one kind of documents more.")]
Out = Annotated[Path | None, typer.Option(help="Write the kernels here, too.")]
Dtype = Annotated[str, typer.Option(help="What to run the model in, such as float32; auto: what it was saved in.")]

app = typer.Typer(no_args_is_help=True, help="Prepare decode=less, which has to learn a model first.")


@app.callback()
def less() -> None:
    """Prepare decode=less, which has to learn a model first."""


@app.command()
def train(
    model: Model = "demo",
    documents: Annotated[int, typer.Option(min=2, help="From how many documents; their kinds take turns.")] = 64,
    tokens: Annotated[int, typer.Option(min=48, help="Length of each, in tokens.")] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="How often to go through them.")] = 10,
    texts: Texts = None,
    out: Out = None,
    dtype: Dtype = "auto",
) -> None:
    """Learn a model's kernels for decode=less, once per model: what a few numbers per layer can tell of tokens that
    were let go of.

    The model stays as it is. The kernels are kept beside the calibration ($CAKEKV_CACHE/less, or ~/.cache/cakekv/less)
    under the fingerprints of the model's weights, where Cake(..., decode="less") finds them; copy that folder to other
    machines. Those of the demo's model come with this package. The texts come with Python, and are none of those that
    cakekv quality judges by.

    Examples:

        cakekv less train --model ./my-model

        cakekv less train --model ./my-model --texts ./my-documents --epochs 20
    """
    from rich.table import Table

    from cakekv.cli.model import load_cake
    from cakekv.codec.texts import learning_texts
    from cakekv.decode.less_kernels import Learned, kernels_file, write_kernels
    from cakekv.decode.less_training import FAIR, Settings, collect, fit

    cake = load_cake(model, None, dtype=dtype)
    engine, length = cake.engine, min(tokens, cake.engine.max_context)
    settings = Settings(epochs=epochs).for_texts(length)
    read = list(learning_texts(cake.tokenizer, documents, length, texts))
    fitted = {}
    with NEWS.status(f"Computing {len(read)} texts …") as status:
        for layer in collect(engine, read):  # type: ignore[arg-type]
            status.update(f"Learning layer {layer.number} …")
            fitted[layer.number] = fit(layer, settings)
    about = {"documents": documents, "tokens": length, "epochs": epochs, "sinks": settings.sinks}
    said = {name: str(value) for name, value in about.items()}
    said["recent"] = ",".join(map(str, settings.recent))
    learned = Learned({number: one.kernels for number, one in fitted.items()}, said)
    data = learned.to_bytes()
    digest = Learned.from_bytes(data).digest  # which checks it
    files = [kernels_file(name) for name in engine.weights_names()] + ([out] if out else [])
    write_kernels(data, files)
    table = Table(title="Mean square error of each layer's output on held-out texts", title_justify="left")
    for column in ("layer", "sinks and newest", f"{FAIR} tokens more", "less"):
        table.add_column(column, justify="right")
    for number, one in fitted.items():
        table.add_row(str(number), f"{one.without:.3g}", f"{one.four_more:.3g}", f"{one.error:.3g}")
    RESULTS.print(table)
    RESULTS.print(f"kernels {digest}: {len(data):,} bytes, from {len(read)} documents")
    for file in files:
        RESULTS.print(str(file))


@app.command()
def tune(
    model: Model = "demo",
    documents: Annotated[int, typer.Option(min=2, help="From how many documents; their kinds take turns.")] = 24,
    tokens: Annotated[int, typer.Option(min=512, help="Length of each, in tokens.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="How often to go through them.")] = 3,
    texts: Texts = None,
    out: Out = None,
    dtype: Dtype = "auto",
) -> None:
    """Go on learning a model's kernels for decode=less, all layers together, behind texts of many lengths.

    It begins with what `cakekv less train` has learned layer by layer, or with what comes with this package, and makes
    the divergence of the next token's distribution from that over the full cache small. After each round, the best
    kernels so far are written to where they are found.

    Examples:

        cakekv less train --model ./my-model && cakekv less tune --model ./my-model
    """
    from cakekv.cli.model import load_cake
    from cakekv.codec.texts import learning_texts
    from cakekv.decode.less_kernels import Learned, find_kernels, kernels_file, write_kernels
    from cakekv.decode.less_training import FAIR
    from cakekv.decode.less_tuning import Tuned, Tuning, tune

    cake = load_cake(model, None, dtype=dtype)
    engine, length = cake.engine, min(tokens, cake.engine.max_context)
    learned = find_kernels(engine.weights_names())
    settings = Tuning(rounds=rounds)
    read = list(learning_texts(cake.tokenizer, documents, length, texts))
    files = [kernels_file(name) for name in engine.weights_names()] + ([out] if out else [])
    about = {**learned.about, "tuned_documents": str(documents), "tuned_tokens": str(length)}
    with NEWS.status(f"Computing {len(read)} texts …") as status:

        def on_step(step: int, steps: int, kl: float) -> None:
            status.update(f"Step {step} of {steps}: {kl:.4f} nats …")

        def on_round(tuned: Tuned) -> None:
            write_kernels(Learned(tuned.layers, about).to_bytes(), files)

        tuned = tune(engine, learned.layers, read, settings, on_step, on_round)  # type: ignore[arg-type]
    RESULTS.print(f"Divergence from the full cache on texts that were held out, in nats: {tuned.kl:.4f}; before,")
    RESULTS.print(
        f"{tuned.before:.4f}; without a state {tuned.without:.4f}, with {FAIR} tokens more {tuned.four_more:.4f}"
    )
    for file in files:
        RESULTS.print(str(file))
