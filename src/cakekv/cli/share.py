"""cakekv share"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cakekv.cli.console import NEWS, RESULTS
from cakekv.errors import CakeError

app = typer.Typer(no_args_is_help=True, help="Find layers that can share what another keeps.")


@app.callback()
def share() -> None:
    """Find layers that can share what another keeps."""


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    layers: Annotated[int, typer.Option(min=1, help="How many layers are to share, at most.")] = 4,
    documents: Annotated[int, typer.Option(min=1, help="From how many texts; their kinds take turns.")] = 30,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each, in tokens.")] = 64,
    texts: Annotated[Path | None, typer.Option(help="A folder with .txt files: one kind of texts more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the map here, too.")] = None,
    dtype: Annotated[
        str, typer.Option(help="What to run the model in, such as float32; auto: what it was saved in.")
    ] = "auto",
) -> None:
    """Find out, once per model, which layers can attend to what an earlier layer keeps, and so keep nothing (KVSharer).

    Layers that are least alike come first; each is tried, and refused if the model's hidden states point elsewhere
    then. The map is kept beside the calibration ($CAKEKV_CACHE/share, or ~/.cache/cakekv/share) under the fingerprints
    of the model's weights, where Cake.from_pretrained(..., share=4) finds it: any number up to what was found. Answers
    are not exact then, and chunks are kept apart from those of the model without sharing, and of other maps.

    Examples:

        cakekv share calibrate --model ./my-model --layers 8

        cakekv ask --model ./my-model --share 4 --document notes.txt --question "What is this about?"
    """
    from cakekv.cli.model import load_cake
    from cakekv.codec.texts import learning_texts
    from cakekv.engine.sharing import Calibration, map_file, most_unlike_first, write_map

    cake = load_cake(model, None, dtype=dtype)
    engine, length = cake.engine, min(tokens, cake.engine.max_context)
    read = list(learning_texts(cake.tokenizer, documents, length, texts))
    with NEWS.status(f"Computing {len(read)} texts …") as status:
        seen = Calibration(engine, read)  # type: ignore[arg-type]

        def tried(pair: tuple[int, int], cosine: float) -> None:
            status.update(f"Layer {pair[1]} with the keys and values of layer {pair[0]}: cosine {cosine:.3f} …")

        found = seen.choose(most_unlike_first(seen.distances()), layers, tried)
    if not found.pairs:
        raise CakeError("no layer of this model can share what another keeps: its hidden states point elsewhere then")
    names = list(engine.weights_names())
    files = [map_file(name) for name in names] + ([out] if out else [])
    write_map(found.to_bytes(names), files)
    for later, earlier in sorted(found.sources.items()):
        RESULTS.print(f"layer {later} attends to what layer {earlier} keeps")
    if len(found.pairs) < layers:
        NEWS.print(f"Only {len(found.pairs)} of {layers} layers: with any other, hidden states point elsewhere.")
    for file in files:
        RESULTS.print(str(file))
