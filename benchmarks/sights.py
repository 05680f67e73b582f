"""What steps that see a part of the cache do to answers: every sight before the same judge as methods that keep fewer.

    python benchmarks/sights.py --json benchmarks/decode.json
    python benchmarks/sights.py --json out/decode.json --tiny     # to try the program

What `cakekv quality --decode` measures, in float32, and KVSharer against the model without. The file's list `judge` has
a row of each, with the columns of the `methods` of compress.json; `judged` has every document, so that an interrupted
run goes on. All else in the file stays.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.quality.compress import DECODE, SHARE, CompressResults
from cakekv.bench.quality.documents import make_documents
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.errors import CakeError

SIGHTS = ("clusterkv:budget=256,tokens=32", "clusterkv:budget=256", "pages:budget=256", "quantspec", "less")
"""Budgets that bite at 1,024 tokens."""
SHARED = "share:11>27,11>28,11>23,9>25"
"""The first four pairs that `cakekv share calibrate` finds for the demo's model: KVSharer is judged here, too."""
COLUMNS = ("kept", "kl", "agreement", "retrieval", "nats", "gold_nats", "cache_bytes", "intervals")


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here, and go on with what is there.")],
    way: Annotated[list[str] | None, typer.Option(help="Only this sight, or map of layers; repeatable.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 21,
    tokens: Annotated[int, typer.Option(min=256, help="Of each.")] = 1024,
    continuation: Annotated[int, typer.Option(min=8, help="Tokens behind it that are predicted.")] = 48,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    tiny: Annotated[bool, typer.Option("--tiny", help="Two documents, as short as can be.")] = False,
) -> None:
    """Judge sights."""
    if tiny:
        documents, tokens, continuation = 2, 256, 8
    settings = {"model": model, "dtype": "float32", "documents": documents, "tokens": tokens}
    settings |= {"continuation": continuation, "questions": "last"}
    ways = {one: SHARE if one.startswith(f"{SHARE}:") else DECODE for one in way or (*SIGHTS, SHARED)}
    results = CompressResults(describe_run(), settings, ways)
    if json_file.exists() and "judged" in json.loads(json_file.read_text()):
        results.read(json_file, "judged")
    loaded: Any = load_cake(model, None, dtype="float32")
    for number, document in enumerate(make_documents(loaded.tokenizer, documents, tokens, continuation)):
        if results.lacks(number):
            results.judge(loaded.engine, number, document)
            write(json_file, results, tokens)
            print(f"{number + 1} of {documents}", flush=True)
    for row in rows(results, tokens):
        print(*(f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in ("name", *COLUMNS[:4])))


def rows(results: CompressResults, tokens: int) -> list[dict[str, Any]]:
    """A row per sight, and one of the full cache."""
    return [
        {"name": one["name"], "tokens": tokens, **{name: one[name] for name in COLUMNS}}
        | {"documents": len(one["documents"])}
        for one in results.figures().values()
    ]


def write(file: Path, results: CompressResults, tokens: int) -> None:
    """Put what was judged so far into the file."""
    rest = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {**rest, "judge": rows(results, tokens), "judged": results.to_dict()})


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
