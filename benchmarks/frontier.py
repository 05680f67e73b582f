"""Draw what the judge found: `python benchmarks/frontier.py`, after `quality_*.json` have changed.

The answers are those of the float32 files. Bytes are those of bfloat16, the type that caches are kept in: in float32
whatever a recipe keeps exact would count twice. Then it names the recipes that are beaten on both models.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from cakekv.bench.quality.picture import Measured, beaten_by, quality_picture

HERE = Path(__file__).resolve().parent
MODELS = {
    "SmolLM2-135M-Instruct: 3 KV heads of width 64": ("quality_float32.json", "quality_bytes.json"),
    "Gemma-3-270M: one KV head of width 256": ("quality_gemma.json", "quality_gemma_bytes.json"),
}
"""By title: the files with the answers and with the bytes."""


def measured(answers: str, sizes: str) -> dict[str, Measured]:
    """By recipe; those that one of the files lacks are left out."""
    answered, sized = (
        {one["recipe"]: one for one in json.loads((HERE / file).read_text())["recipes"]} for file in (answers, sizes)
    )
    return {
        recipe: Measured(sized[recipe]["bytes_per_token"], one["agreement"], one["kl"])
        for recipe, one in answered.items()
        if recipe in sized
    }


def main() -> None:
    """Write frontier.png."""
    models = {title: measured(*files) for title, files in MODELS.items()}
    quality_picture(models, HERE / "frontier.png")
    for recipe in dict.fromkeys(recipe for one in models.values() for recipe in one):
        better = [set(beaten_by(recipe, one)) for one in models.values() if recipe in one]
        if len(better) == len(models) and (everywhere := set.intersection(*better)):
            typer.echo(f"{recipe}: beaten on every model by {', '.join(sorted(everywhere))}")
        elif len(better) == len(models) and all(better):
            typer.echo(f"{recipe}: beaten on every model, by different recipes")


if __name__ == "__main__":
    typer.run(main)
