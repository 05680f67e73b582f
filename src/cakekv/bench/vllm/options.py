"""Options that the programs which measure the plug-in have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[Path, typer.Option("--json", help="Write the results here.")]
Picture = Annotated[Path | None, typer.Option(help="Draw them here.")]
ModelFolder = Annotated[Path | None, typer.Option(help="The model's folder; by default the demo's.")]
Prefix = Annotated[int, typer.Option(min=1, help="Stored tokens: a multiple of --chunk-tokens.")]
Suffix = Annotated[int, typer.Option(min=1, help="Tokens after it.")]
ChunkTokens = Annotated[int, typer.Option(min=1, help="Tokens per chunk.")]
StepTokens = Annotated[int, typer.Option(min=1, help="vLLM's --max-num-batched-tokens.")]
Ratios = Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; medians count.")]
LayeredFinish = Annotated[bool, typer.Option("--layered-finish", help="Let the plug-in's suffix wait in its layers.")]
Serve = Annotated[str, typer.Option(help="More of vLLM's command line.")]
