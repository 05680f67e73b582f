"""What is left of a cache when the question changes: SCBench in miniature.

    python benchmarks/scbench.py --json benchmarks/scbench.json
    python benchmarks/scbench.py --json benchmarks/scbench.json --add     # go on where it stopped, or with more methods
    python benchmarks/scbench.py --print benchmarks/scbench.json          # what is in the file

What `cakekv scbench` measures, with the settings of the committed file; that help says what the figures are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cakekv.bench.scbench import TASKS
from cakekv.cli.scbench import judge_sessions, print_results, variants_named
from cakekv.errors import CakeError

CODECS = ("int8", "kivi:bits=4")
METHODS = (
    *("heavy_hitter:share=0.2,recent=0.25,rows=16,pool=7", "sink_recent:share=0.2"),
    *("dbudgetkv", "corm:window=64,recent=64", "vl_cache:share=0.2"),
    *("elastic_cache:share=0.2", "kvmerger", "cascading:size=256"),
)
SIGHTS = ("clusterkv:budget=256,tokens=32", "quantspec", "less")


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what is in the file; judge only what it lacks.")] = False,
    print_file: Annotated[
        Path | None, typer.Option("--print", help="Print what this file has, and nothing else.")
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Only what is given; repeatable.")] = None,
    compress: Annotated[list[str] | None, typer.Option(help="Likewise.")] = None,
    decode: Annotated[list[str] | None, typer.Option(help="Likewise.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Of each task.")] = 2,
    tokens: Annotated[int, typer.Option(min=256, help="Of each context.")] = 1024,
    task: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
) -> None:
    """Measure what answers to several questions lose."""
    if print_file is not None:
        print_results(json.loads(print_file.read_text()))
        return
    given = [compress or (), codec or (), decode or ()]
    judge_sessions(
        variants_named(*(given if any(given) else (METHODS, CODECS, SIGHTS))),
        json_file,
        add=add,
        tasks=task or tuple(TASKS),
        sessions=sessions,
        tokens=tokens,
        model=model,
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
