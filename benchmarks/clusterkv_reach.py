"""Which part of a stored prefix a first token needs that sees only what ClusterKV selects.

    python benchmarks/clusterkv_reach.py --json benchmarks/decode.json

A document's context is computed; then the first token behind it, which sees everything. Counted is what ClusterKV would
have selected for it: in how many chunks that stands, in any layer and head; in how many segments, which are layers of
chunks; and how many rows it is, keys and values of one token and head. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

from cakekv.bench.quality.documents import make_documents
from cakekv.bench.quality.intervals import figures_of
from cakekv.bench.systems import Claim, write_systems
from cakekv.cli.console import number_list
from cakekv.cli.model import load_cake
from cakekv.compress.base import Layer
from cakekv.decode.base import Sight, View
from cakekv.decode.clusterkv import ClusterKV

WORTHWHILE = 0.5
"""At most this share of the chunks, else both arms are through with all of them as soon."""
_SPAN = 512
_KINDS = ("chunks", "segments", "rows")


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results in here, beside those of others.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    tokens: Annotated[int, typer.Option(help="Of a context.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    budgets: Annotated[str, typer.Option(help="Tokens that a query sees.")] = "128,256,512",
) -> None:
    """Count what a first token needs."""
    cake = load_cake(model, None, dtype="float32")
    engine, chunk = cake.engine, cake.chunk_tokens
    counted = [ClusterKV(budget=budget) for budget in number_list(budgets, int, "budgets")]
    rows: list[dict[int, dict[str, float]]] = []
    for document in make_documents(cake.tokenizer, documents, tokens, 1, paragraphs=True):
        prompt, end = document.context, len(document.context) - 1
        cache = engine.new_cache(end)
        for start in range(0, end, _SPAN):
            engine.compute(cache, prompt[start : min(start + _SPAN, end)], start)
        reach = Reach(tuple(counted), end // chunk * chunk, chunk)
        engine.compute(engine.look(cache, prompt[:end], reach), prompt[end:], end)
        rows.append({budget: reach.shares(budget) for budget in reach.needed})
        print(len(rows), rows[-1], flush=True)
        settings = {"model": model, "dtype": "float32", "documents": len(rows), "context_tokens": tokens}
        settings |= {"chunk_tokens": chunk, "sights": [one.recipe for one in counted]}
        write_systems(json_file, "clusterkv reach", [_claim(one.budget, tokens, rows) for one in counted], settings)


def _claim(budget: int, tokens: int, rows: Sequence[dict[int, dict[str, float]]]) -> Claim:
    figures: dict[str, Any] = figures_of({kind: [(row[budget][kind], 1.0) for row in rows] for kind in _KINDS})
    return Claim(
        f"clusterkv reach: {budget} of {tokens} tokens",
        f"at most {WORTHWHILE} of a prefix's chunks hold what its first token selects: to load these first pays",
        figures,
        figures["chunks"] <= WORTHWHILE,
    )


@dataclass(frozen=True)
class Reach(Sight):
    """Sees everything, and notes what others would select for the newest token.

    Parameters
    ----------
    sights : tuple of ClusterKV
        The others; their clusters are the same.
    end : int
        The stored prefix's length.
    chunk : int
        Tokens of a chunk.
    """

    name: ClassVar[str] = "reach"
    sights: tuple[ClusterKV, ...]
    end: int
    chunk: int
    memos: dict[int, dict[str, Any]] = field(default_factory=dict)
    needed: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By budget, of every layer: (kv_heads, tokens), whether a row is selected."""

    def prepare(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            self.sights[0].prepare([replace(layer, memo=self.memos.setdefault(layer.index, {}))])

    def view(self, layer: Layer, mask: torch.Tensor | None) -> View:
        groups = self.memos[layer.index].get("groups")
        for sight in self.sights:
            if groups is None:
                continue
            chosen = sight.chosen(layer, groups).flatten(1)
            rows = torch.zeros((layer.heads, layer.entries), dtype=torch.bool).scatter_(1, chosen, True)
            rows[:, : sight.sinks] = True
            self.needed.setdefault(sight.budget, []).append(rows[:, : self.end])
        return super().view(layer, mask)

    def shares(self, budget: int) -> dict[str, float]:
        """Which part of each of `_KINDS` is needed, of the layers that select."""
        rows = torch.stack(self.needed[budget])
        segments = rows.reshape(*rows.shape[:2], -1, self.chunk).any(3).any(1)
        parts = (segments.any(0), segments, rows)
        return {kind: float(part.float().mean()) for kind, part in zip(_KINDS, parts, strict=True)}


if __name__ == "__main__":
    typer.run(main)
