"""ClusterKV beside pages of 16 tokens: what they see of the true top keys, and what becomes of answers.

    python benchmarks/clusterkv.py --json benchmarks/decode.json
    python benchmarks/clusterkv.py --json benchmarks/decode.json --lengths 8000 --documents 20 --add

Every document's context is computed once. Its continuation and its needles are then run over it, once with everything
in sight, and once with each sight: with the full cache's queries for the recall of the keys with the greatest products,
and with its own for agreement and needles. Nothing here is timed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.quality.intervals import figures_of
from cakekv.bench.quality.judge import Reference, answers
from cakekv.bench.systems import Claim, write_systems
from cakekv.cli.console import number_list
from cakekv.cli.model import load_cake
from cakekv.compress.base import Layer
from cakekv.decode.base import Sight, View
from cakekv.decode.clusterkv import ClusterKV
from cakekv.decode.groups import Grouped
from cakekv.decode.pages import Pages
from cakekv.engine.ragged import RaggedCache
from cakekv.engine.transformers import TransformersEngine

AGREEMENT = 0.95
"""At a budget of 512 of 4k tokens, at least this share of the likeliest tokens should be the same."""
FINER = 32
"""Tokens of a cluster, on average, of a second variant."""
_SPAN = 512
_EVERY = 4
"""Of the queries, every so many is asked for its top keys."""


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results in here, beside those of others.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    lengths: Annotated[str, typer.Option(help="Contexts, in tokens.")] = "4096",
    documents: Annotated[str, typer.Option(help="How many documents of each length.")] = "21",
    budgets: Annotated[str, typer.Option(help="Tokens that a query sees.")] = "128,256,512",
    add: Annotated[bool, typer.Option("--add", help="Keep what the file has of other lengths.")] = False,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens behind a context that are compared.")] = 64,
) -> None:
    """Compare sights."""
    cake = load_cake(model, None, dtype="float32")
    assert isinstance(cake.engine, TransformersEngine)
    seen: list[Grouped] = [
        kind(budget=budget, tokens=tokens)
        for budget in number_list(budgets, int, "budgets")
        for kind, tokens in ((ClusterKV, 80), (ClusterKV, FINER), (Pages, 16))
    ]
    rows: dict[int, list[dict[str, Any]]] = {}
    counts: list[int] = number_list(documents, int, "documents")
    for length, count in zip(number_list(lengths, int, "lengths"), counts, strict=True):
        rows[length] = []
        for document in make_documents(cake.tokenizer, count, length, continuation, paragraphs=True):
            rows[length].append(judged(cake.engine, document, seen))
            print(length, len(rows[length]), {name: row["agreement"] for name, row in rows[length][-1].items()})
            claims = [claim for each, judgements in rows.items() for claim in claims_of(each, judgements, seen)]
            settings = {
                "model": model,
                "dtype": "float32",
                "documents": {str(each): len(judgements) for each, judgements in rows.items()},
                "continuation_tokens": continuation,
                "recall_of_every": _EVERY,
                "sights": [one.recipe for one in seen],
            }
            write_systems(json_file, "clusterkv:", claims, settings, f" {lengths} tokens" if add else "")


def judged(engine: TransformersEngine, document: Document, sights: Sequence[Grouped]) -> dict[str, dict[str, float]]:
    """What becomes of a document's answers and keys, by sight."""
    start = len(document.context) - 1
    cache = engine.new_cache(start)
    for begin in range(0, start, _SPAN):
        engine.compute(cache, document.context[begin : min(begin + _SPAN, start)], begin)
    watch = Watch(tuple(sights), start)
    ragged = engine.look(cache, document.context[:start], watch)
    reference = Reference(followed(engine, ragged, document), len(document.continuation))
    asked = answers(document, reference.likeliest)
    rows = {}
    for sight in sights:
        for number, layer in enumerate(ragged.stored):
            layer.memo.clear()
            layer.memo.update(watch.memos.get((label(sight), number), {}))
        ragged.sight = sight
        kl, agreement, likeliest = reference.compare(followed(engine, ragged, document))
        found = [one for one, known in zip(answers(document, likeliest), asked, strict=True) if known]
        totals = watch.totals[sight.recipe]
        rows[f"{label(sight)} {sight.budget}"] = {
            "kl": kl,
            "agreement": agreement,
            "asked": len(found),
            "found": sum(found),
            "recall": totals["recall"] / totals["queries"],
            "mass": totals["mass"] / totals["queries"],
        }
    return rows


def followed(engine: TransformersEngine, cache: RaggedCache, document: Document) -> torch.Tensor:
    """Logits that predict each token of the document's tail: (tokens, vocabulary). The cache stays as it is."""
    start, token_ids = cache.length, [document.context[-1], *document.tail[:-1]]
    with torch.inference_mode(), engine.tap.handing(cache.attend) as twin, cache.driven():
        logits: torch.Tensor = engine.forward_of(twin, cache, token_ids).logits[0].float()
    cache.give_up(start)
    return logits


@dataclass(frozen=True)
class Watch(Sight):
    """Sees everything, and notes what others would see of the keys with the greatest products.

    Parameters
    ----------
    sights : tuple of Grouped
        The others.
    end : int
        The context's length.
    """

    name: ClassVar[str] = "watch"
    sights: tuple[Grouped, ...]
    end: int
    memos: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    totals: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def prepare(self, layers: Sequence[Layer]) -> None:
        least = {label(sight): sight for sight in sorted(self.sights, key=lambda sight: -sight.budget)}
        for layer, sight in ((layer, sight) for layer in layers for sight in least.values()):
            memo = self.memos.setdefault((label(sight), layer.index), {})
            sight.prepare([replace(layer, memo=memo)])

    def view(self, layer: Layer, mask: torch.Tensor | None) -> View:
        assert layer.queries is not None
        some = layer.queries[:, ::_EVERY]
        logits = some.float().reshape(layer.heads, -1, *some.shape[1:]) @ layer.keys[:, None, : self.end].float().mT
        shares = (logits * layer.scaling).softmax(-1)
        for sight in self.sights:
            groups = self.memos[label(sight), layer.index].get("groups")
            if groups is None:
                continue
            chosen = sight.chosen(replace(layer, queries=some), groups)
            seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, chosen, True)
            seen[..., : sight.sinks] = True
            total = self.totals[sight.recipe]
            total["recall"] += float(seen.gather(-1, logits.topk(sight.budget).indices).float().mean(-1).sum())
            total["mass"] += float((shares * seen).sum())
            total["queries"] += shares[..., 0].numel()
        return super().view(layer, mask)


def label(sight: Grouped) -> str:
    """What figures call it."""
    return f"{sight.name}:tokens={FINER}" if sight == replace(ClusterKV(sight.budget), tokens=FINER) else sight.name


def claims_of(length: int, rows: Sequence[dict[str, dict[str, float]]], sights: Sequence[Grouped]) -> list[Claim]:
    """What is claimed of ClusterKV at a context's length, and whether it holds."""
    claims = []
    for budget in sorted({sight.budget for sight in sights}):
        labels = dict.fromkeys(label(sight) for sight in sights)
        each = {name: [row[f"{name} {budget}"] for row in rows] for name in labels}
        pair = list(zip(each["clusterkv"], each["pages"], strict=True))
        figures = {name: _figures(ones) for name, ones in each.items()}
        recall = [(x["recall"] - y["recall"], 1.0) for x, y in pair]
        found = [((x["found"] - y["found"]) / max(x["asked"], 1), x["asked"]) for x, y in pair]
        more = figures_of({"recall": recall, "retrieval": found})
        at = f"clusterkv: {budget} of {length} tokens"
        only = {name: {key: one[key] for key in ("recall", "mass")} for name, one in figures.items()}
        claims.append(
            Claim(
                f"{at}, recall",
                "it sees more of the keys with the greatest products than pages of 16 tokens do",
                {**only, "more": more["recall"], "interval": more["intervals"]["recall"]},
                more["recall"] > 0,
            )
        )
        only = {name: {"retrieval": one["retrieval"], "needles": one["needles"]} for name, one in figures.items()}
        claims.append(
            Claim(
                f"{at}, needles",
                "it finds more needles than pages of 16 tokens do, of those that the full cache finds",
                {**only, "more": more["retrieval"], "interval": more["intervals"]["retrieval"]},
                (more["retrieval"] or 0) > 0,
            )
        )
        only = {name: {key: one[key] for key in ("agreement", "kl", "intervals")} for name, one in figures.items()}
        wanted = "more of the likeliest tokens are the full cache's than with pages of 16 tokens"
        least = figures["pages"]["agreement"]
        if (length, budget) == (4096, 512):
            wanted, least = f"at least {AGREEMENT} of the likeliest tokens are the full cache's", AGREEMENT
        for name in labels:
            if name != "pages":
                holds = figures[name]["agreement"] >= least
                claims.append(Claim(at.replace("clusterkv", name, 1) + ", agreement", wanted, only, holds))
    return claims


def _figures(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    columns = {name: [(row[name], 1.0) for row in rows] for name in ("agreement", "kl", "recall", "mass")}
    columns["retrieval"] = [(row["found"] / max(row["asked"], 1), row["asked"]) for row in rows]
    return {**figures_of(columns), "needles": int(sum(row["asked"] for row in rows))}


if __name__ == "__main__":
    typer.run(main)
