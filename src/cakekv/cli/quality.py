"""cakekv quality"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from cakekv.cli.console import NEWS, RESULTS, one_of, write_json
from cakekv.codec import CODECS
from cakekv.compress import METHODS
from cakekv.decode import SIGHTS
from cakekv.errors import BadInput
from cakekv.reuse import WAYS, reuse_named

DOCUMENTS = (4, 5, 6, 7, 8)
"""In prompts for judging reuse, which take turns."""


def quality(
    recipe: Annotated[
        list[str] | None,
        typer.Option(help=f'A codec: {one_of(CODECS)}; with parameters "kivi:bits=2,window=128". Repeatable.'),
    ] = None,
    reuse: Annotated[
        list[str] | None,
        typer.Option(help=f'A way to reuse documents: {one_of(WAYS)}; with parameters "epic:link=16". Repeatable.'),
    ] = None,
    compress: Annotated[
        list[str] | None,
        typer.Option(help=f"A way to keep fewer tokens: {one_of(METHODS)}; with parameters, as for Cake. Repeatable."),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(help=f"What a decode step sees: {one_of(SIGHTS)}; with parameters, as for Cake. Repeatable."),
    ] = None,
    question_first: Annotated[
        bool, typer.Option("--question-first", help="With --compress: choose once the question about a needle is read.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep what is in the JSON file; judge only what it lacks.")
    ] = False,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts, with --reuse.  [default: 20]")] = None,
    documents: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many documents; the kinds take turns. With --reuse: in each prompt.  "
            "[default: 24; with --reuse: 4 to 8 in turn]",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=256, help="Length of each, in tokens.  [default: 1536; with --reuse: 384]")
    ] = None,
    continuation: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens behind it that are predicted.  [default: 128; with --reuse: 64]"),
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="A folder with .txt files: one kind of documents more.")] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 64,
    computed: Annotated[
        list[float] | None,
        typer.Option(help="With --recipe: share of each document, from its front, that is computed; repeatable."),
    ] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[
        str, typer.Option(help="What to run it in, such as float32; auto: what it was saved in.")
    ] = "auto",
) -> None:
    """Judge codecs, ways to reuse documents, or compression: what they do to answers, against the exact cache.

    Codecs: each document's keys and values are encoded, decoded and put back; then the model goes on. kl is the
    divergence of its next-token distribution, in nats; agreement the share of positions with the same likeliest token;
    retrieval the share of needles found, of those that the exact cache finds. Intervals are 95 % bootstrap intervals
    over documents; of several recipes the JSON file has the differences of every two, too, on the same documents, under
    "paired". GB/s are of the exact cache, on one thread, or decoded on the model's GPU if it can, while nothing else
    should run.

    Ways to reuse: each prompt is several documents that were computed by themselves, then what follows the last one,
    then questions; the answers to some need one document, to some two. gold nats is the mean log-likelihood of the
    right answers' tokens. Intervals are over prompts, and what is claimed of the ways is under "claims".

    Compression: each document is computed, and what of its cache a method keeps, or a sight sees, is gone on with:
    token by token where a choice is made on every step. kept is the share of the entries of all layers and heads;
    choose s the seconds that the choice takes, token s those of a step. Questions come after the choice, unless
    --question-first. Of a method that acts at store, each full chunk is encoded, decoded and put back.

    In sixteen bits the model's own roundings let the slightest change of the cache flip near ties: --dtype float32
    shows what is the codec's, or the way's, doing.

    Examples:

        cakekv quality --recipe int8 --json int8.json

        cakekv quality --recipe kivi --recipe kivi:window=0 --recipe kivi:keys=token --json kivi.json

        cakekv quality --recipe k5v4 --add --json kivi.json

        cakekv quality --recipe kivi:window=0 --computed 0 --computed 0.5 --json both-arms.json

        cakekv quality --reuse turned --reuse epic:link=16 --dtype float32 --json reuse.json

        cakekv quality --compress heavy_hitter:share=0.5 --compress sink_recent:share=0.5 --dtype float32
    """
    fewer = bool(compress or decode)
    if bool(recipe) + bool(reuse) + fewer != 1:
        raise BadInput(
            "say what to judge: codecs with --recipe, ways to reuse documents with --reuse, or fewer tokens with "
            "--compress and --decode"
        )
    if add and json_file is None:
        raise BadInput("--add needs the file that it adds to: --json FILE")
    if reuse:
        if computed:
            raise BadInput("--computed goes with --recipe: documents that are reused are loaded as a whole")
        sizes = {"prompts": prompts, "documents": documents, "tokens": tokens, "continuation": continuation}
        given = {name: value for name, value in sizes.items() if value is not None}
        judge_reuse(
            reuse, json_file, add=add, texts=texts, chunk_tokens=chunk_tokens, model=model, dtype=dtype, **given
        )
        return
    if prompts is not None:
        raise BadInput("--prompts goes with --reuse: all else is judged on single documents")
    if fewer:
        if computed:
            raise BadInput("--computed goes with --recipe: here all of a document is computed")
        judge_compress(
            dict.fromkeys(compress or (), "compress") | dict.fromkeys(decode or (), "decode"),
            json_file,
            add=add,
            documents=documents or 24,
            tokens=tokens or 1536,
            continuation=continuation or 128,
            question_first=question_first,
            texts=texts,
            chunk_tokens=chunk_tokens,
            model=model,
            dtype=dtype,
        )
        return
    _judge_codecs(
        list(dict.fromkeys(recipe or ())),
        json_file,
        add=add,
        documents=documents or 24,
        tokens=tokens or 1536,
        continuation=continuation or 128,
        texts=texts,
        chunk_tokens=chunk_tokens,
        shares=list(dict.fromkeys(computed or [0.0])),
        model=model,
        dtype=dtype,
    )


def _judge_codecs(
    recipe: list[str],
    json_file: Path | None,
    *,
    add: bool,
    documents: int,
    tokens: int,
    continuation: int,
    texts: Path | None,
    chunk_tokens: int,
    shares: list[float],
    model: str,
    dtype: str,
) -> None:
    from rich.progress import track

    from cakekv.bench.machine import describe_run
    from cakekv.bench.quality.documents import make_documents
    from cakekv.bench.quality.earlier import check_same, earlier
    from cakekv.bench.quality.judge import Judge, Judgement, paired, summary
    from cakekv.cli.model import load_cake
    from cakekv.codec import codec_named
    from cakekv.codec.base import Codec

    for one in recipe:
        codec_named(one)  # that it is none is said before a model is loaded
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
    RESULTS.print(_codecs_table(dict(zip(variants, figures, strict=True))))


def judge_reuse(
    ways: Sequence[str],
    json_file: Path | None,
    *,
    add: bool = False,
    prompts: int = 20,
    documents: int | None = None,
    tokens: int = 384,
    continuation: int = 64,
    texts: Path | None = None,
    chunk_tokens: int = 64,
    model: str = "demo",
    dtype: str = "float32",
) -> None:
    """Judge ways to reuse documents; parameters as of `quality`.

    Raises
    ------
    BadInput
        There is no such way, or the file cannot be added to.
    """
    from rich.progress import track

    from cakekv.bench.machine import describe_run
    from cakekv.bench.quality.rag import make_prompts
    from cakekv.bench.quality.reuse import ReuseResults
    from cakekv.cli.model import load_cake

    for way in ways:
        reuse_named(way)  # that it is none is said before a model is loaded
    numbers = list(DOCUMENTS) if documents is None else [documents]
    settings = {"model": model, "dtype": dtype, "documents": numbers, "tokens": tokens, "continuation": continuation}
    settings |= {"chunk_tokens": chunk_tokens, "prompts": prompts}
    results = ReuseResults(describe_run(), settings, list(dict.fromkeys(ways)))
    if json_file is not None and json_file.exists():
        results.read(json_file, add=add)
    if results.is_complete:
        raise BadInput(f"{json_file} has all of these ways already")
    cake = load_cake(model, None, dtype=dtype)
    made = make_prompts(cake.tokenizer, prompts, numbers, tokens, continuation, texts)
    for number, prompt in enumerate(track(made, "Judging", console=NEWS, transient=True)):
        results.judge(cake.engine, number, prompt)  # type: ignore[arg-type]  # load_cake makes transformers engines
        if json_file is not None:  # so that an interrupted run leaves what it has
            write_json(json_file, results.to_dict())
    data = results.to_dict()
    RESULTS.print(_reuse_table(data["methods"]))
    for claim in data["claims"]:
        low, high = claim["interval"]
        NEWS.print(
            f"{'holds' if claim['holds'] else 'fails'}: {claim['claim']}: {claim['measured']:.1%} "
            f"[{low:.1%}, {high:.1%}]"
        )


def judge_compress(
    ways: Mapping[str, str],
    json_file: Path | None,
    *,
    add: bool,
    documents: int,
    tokens: int,
    continuation: int,
    question_first: bool,
    texts: Path | None,
    chunk_tokens: int,
    model: str,
    dtype: str,
) -> None:
    """Judge methods and sights: by recipe, the option that it is for; other parameters as of `quality`."""
    from rich.progress import track

    from cakekv.bench.machine import describe_run
    from cakekv.bench.quality.compress import CompressResults
    from cakekv.bench.quality.documents import make_documents
    from cakekv.cli.model import load_cake
    from cakekv.engine.sharing import LayerMap

    settings = {"model": model, "dtype": dtype, "documents": documents, "tokens": tokens, "continuation": continuation}
    settings |= {"questions": "first" if question_first else "last", "chunk_tokens": chunk_tokens}
    results = CompressResults(describe_run(), settings, ways)
    if add and json_file is not None and json_file.exists():
        results.read(json_file)
    if results.is_complete:
        raise BadInput(f"{json_file} has all of these already")
    cake = load_cake(model, None, dtype=dtype)
    cake.engine.compressible([way for way in results.ways.values() if not isinstance(way, LayerMap)])
    made = make_documents(cake.tokenizer, documents, tokens, continuation, texts)
    for number, document in enumerate(track(made, "Judging", console=NEWS, transient=True)):
        results.judge(cake.engine, number, document)  # type: ignore[arg-type]  # load_cake makes transformers engines
        if json_file is not None:  # so that an interrupted run leaves what it has
            write_json(json_file, results.to_dict())
    RESULTS.print(_compress_table(results.figures()))


def _compress_table(figures: dict[str, dict[str, Any]]) -> Any:
    return _table(
        "keeps",
        figures,
        {
            "agreement": ".3f",
            "kl": ".4f",
            "retrieval": ".2f",
            "gold_nats": ".3f",
            "kept": ".1%",
            "cache_bytes": ",.0f",
            "choose_s": ".2f",
            "token_s": ".3f",
        },
    )


def _reuse_table(methods: Iterable[dict[str, Any]]) -> Any:
    return _table(
        "way",
        {method["name"]: method for method in methods},
        {
            "agreement": ".3f",
            "kl": ".4f",
            "retrieval": ".2f",
            "retrieval_two": ".2f",
            "of_all": ".2f",
            "gold_nats": ".3f",
            "gold_nats_two": ".3f",
            "recomputed_share": ".1%",
        },
    )


def _codecs_table(figures: dict[str, dict[str, Any]]) -> Any:
    return _table(
        "recipe",
        figures,
        {
            "agreement": ".3f",
            "kl": ".4f",
            "retrieval": ".2f",
            "bytes_per_token": ",.0f",
            "ratio": ".2f",
            "coded_ratio": ".2f",
            "encode_gbps": ".2f",
            "decode_gbps": ".2f",
        },
    )


def _table(first: str, figures: dict[str, dict[str, Any]], columns: dict[str, str]) -> Any:
    """A row per recipe or way; of columns, by the figure's name, the form."""
    from rich.table import Table

    table = Table()
    table.add_column(first)
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
