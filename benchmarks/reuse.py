"""What reusing documents does to answers: prompts of several documents, against the same prompts computed in full.

    python benchmarks/reuse.py --json benchmarks/reuse.json
    python benchmarks/reuse.py --json benchmarks/reuse.json --add     # go on where it stopped, or with more ways

What `cakekv quality --reuse` measures, with all ways that are compared in docs/reuse.md, in float32: that help and
`cakekv.bench.quality.reuse.summary` say what the figures are. What reuse_ttft.py measured stays in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cakekv.cli.quality import judge_reuse
from cakekv.errors import CakeError

WAYS = (
    *("naive", "turned"),
    *("epic:link=1", "epic:link=16", "epic:link=32"),
    *("blend:recompute=0.05", "blend:recompute=0.15", "blend:recompute=0.3"),
    "blend:recompute=0.15,choice=random",
)


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    add: Annotated[bool, typer.Option("--add", help="Keep what is in the file; judge only what it lacks.")] = False,
    way: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    documents: Annotated[int | None, typer.Option(min=2, help="In each; if not given, 4 to 8 in turn.")] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Of each document.")] = 384,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that follow the last document.")] = 64,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
) -> None:
    """Measure what reuse does to a model's answers."""
    judge_reuse(
        way or WAYS,
        json_file,
        add=add,
        prompts=prompts,
        documents=documents,
        tokens=tokens,
        continuation=continuation,
        model=model,
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
