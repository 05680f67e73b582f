"""cakekv quality"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from cakekv.cli.console import NEWS, RESULTS, one_of, write_json
from cakekv.codec import CODECS
from cakekv.errors import BadInput


def quality(
    recipe: Annotated[
        list[str],
        typer.Option(help=f'A codec: {one_of(CODECS)}; with parameters "kivi:bits=2,window=128". Repeatable.'),
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep what is in the JSON file; judge only the recipes that it lacks.")
    ] = False,
    documents: Annotated[int, typer.Option(min=1, help="How many documents; the kinds take turns.")] = 24,
    tokens: Annotated[int, typer.Option(min=256, help="Length of each, in tokens.")] = 1536,
    continuation: Annotated[int, typer.Option(min=8, help="Tokens behind it that are predicted.")] = 128,
    texts: Annotated[Path | None, typer.Option(help="A folder with .txt files: one kind of documents more.")] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 64,
    computed: Annotated[
        list[float] | None, typer.Option(help="Share of each document, from its front, that is computed; repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[
        str, typer.Option(help="What to run it in, such as float32; auto: what it was saved in.")
    ] = "auto",
) -> None:
    """Judge codecs: what they do to a model's answers, against the exact cache, and what they save.

    Each document's keys and values are encoded, decoded and put back; then the model goes on. kl is the divergence of
    its next-token distribution, in nats; agreement the share of positions with the same likeliest token; retrieval the
    share of needles found, of those that the exact cache finds. Intervals are 95 % bootstrap intervals over documents;
    of several recipes the JSON file has the differences of every two, too, on the same documents, under "paired".
    GB/s are of the exact cache, on one thread, or decoded on the model's GPU if it can, while nothing else should run.
    In sixteen bits the model's own roundings let the slightest change of the cache flip near ties: --dtype float32
    shows what is the codec's doing.

    Examples:

        cakekv quality --recipe int8 --json int8.json

        cakekv quality --recipe kivi --recipe kivi:window=0 --recipe kivi:keys=token --json kivi.json

        cakekv quality --recipe k5v4 --add --json kivi.json

        cakekv quality --recipe kivi:window=0 --computed 0 --computed 0.5 --json both-arms.json
    """
    from rich.progress import track

    from cakekv.bench.machine import describe_run
    from cakekv.bench.quality.documents import make_documents
    from cakekv.bench.quality.earlier import check_same, earlier
    from cakekv.bench.quality.judge import Judge, Judgement, paired, summary
    from cakekv.cli.model import load_cake
    from cakekv.codec import codec_named
    from cakekv.codec.base import Codec

    recipe = list(dict.fromkeys(recipe))
    for one in recipe:
        codec_named(one)  # that it is none is said before a model is loaded
    shares = list(dict.fromkeys(computed or [0.0]))
    if add and json_file is None:
        raise BadInput("--add needs the file that it adds to: --json FILE")
    cake = load_cake(model, None, dtype=dtype)
    settings = {
        **describe_run(),
        "model": model,
        "dtype": dtype,
        "context_tokens": tokens,
        "continuation_tokens": continuation,
        "chunk_tokens": chunk_tokens,
    }

    def codec_of(name: str) -> Codec:
        return codec_named(name).for_model(cake.engine.weights_names())

    judged: dict[tuple[str, float], list[Judgement]] = {}
    if add and json_file is not None and json_file.exists():
        settings["command"], judged = earlier(json_file, settings, documents, recipe, codec_of)
    kept = next(iter(judged.values()), None)
    missing = [one for one in recipe if any((one, share) not in judged for share in shares)]
    if not missing:
        raise BadInput(f"{json_file} has all of these recipes already")
    codecs = {one: codec_of(one) for one in (*(name for name, _ in judged), *recipe)}
    judged |= {(one, share): [] for share in shares for one in missing}
    variants = [f"{one}, {share:g} computed" if share else one for one, share in judged]
    judge = Judge(cake.engine, chunk_tokens)  # type: ignore[arg-type]  # load_cake makes transformers engines
    made = make_documents(cake.tokenizer, documents, tokens, continuation, texts)
    figures: list[dict[str, Any]] = []
    for number, document in enumerate(track(made, "Judging", console=NEWS, transient=True)):
        new = judge.judge(document, [codecs[one] for one in missing], shares)
        if kept is not None and json_file is not None:
            check_same(json_file, kept[number], new[0])
        for (share, name), judgement in zip(product(shares, missing), new, strict=True):
            judged[name, share].append(judgement)
        figures = [summary(name, codecs[name], ones, share) for (name, share), ones in judged.items()]
        if json_file is not None:  # so that an interrupted run leaves what it has
            several = {"recipes": figures, "paired": paired(dict(zip(variants, judged.values(), strict=True)))}
            write_json(json_file, settings | (figures[0] if len(figures) == 1 else several))
    RESULTS.print(_table(dict(zip(variants, figures, strict=True))))


def _table(figures: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("recipe")
    columns = {
        "agreement": ".3f",
        "kl": ".4f",
        "retrieval": ".2f",
        "bytes_per_token": ",.0f",
        "ratio": ".2f",
        "coded_ratio": ".2f",
        "encode_gbps": ".2f",
        "decode_gbps": ".2f",
    }
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for variant, one in figures.items():
        cells = []
        for name, form in columns.items():
            value = one.get(name)
            low, high = one["intervals"].get(name, (None, None))
            if value is None:
                cells.append("–")
            elif name in ("agreement", "kl", "retrieval") and low is not None:
                cells.append(f"{value:{form}} [{low:{form}}, {high:{form}}]")
            else:
                cells.append(f"{value:{form}}")
        table.add_row(variant, *cells)
    return table
