"""Whether layers that are unlike should share what they keep, as KVSharer has it, on the demo's model.

    python benchmarks/kvsharer.py --json benchmarks/decode.json

Maps are chosen as `cakekv share calibrate` does, but for the order in which pairs are tried: least alike first, most
alike first, or at random. Perplexity, and the Kullback-Leibler divergence from the model without sharing, are of
documents that no map was chosen with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from cakekv.bench.quality.documents import make_documents
from cakekv.bench.quality.intervals import interval
from cakekv.bench.systems import Claim, write_systems
from cakekv.codec.texts import learning_texts
from cakekv.demo.model import demo_model
from cakekv.engine.sharing import LEAST_COSINE, Calibration, LayerMap, cache_with, most_unlike_first
from cakekv.engine.transformers import TransformersEngine, load_tokenizer

SIZES = (4, 7)
STEPS = 12


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here, beside those of other systems.")],
    documents: Annotated[int, typer.Option(min=2, help="How many to judge by.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, help="Of each.")] = 128,
    texts: Annotated[int, typer.Option(min=2, help="How many to choose maps with.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Random orders.")] = 5,
    long: Annotated[int, typer.Option(min=256, help="Tokens before the steps that are timed.")] = 7000,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two short documents, to see that it works.")] = False,
) -> None:
    """Compare orders of pairs, in float32."""
    sizes = (1, 2) if tiny else SIZES
    if tiny:
        documents, texts, seeds, long = 2, 2, 1, 300
    engine = TransformersEngine.from_pretrained(demo_model(), dtype="float32")
    tokenizer = load_tokenizer(demo_model())
    read = [document.context[:tokens] for document in make_documents(tokenizer, documents, max(256, tokens), 16)]
    seen = Calibration(engine, list(learning_texts(tokenizer, texts, 64)))
    ranked = most_unlike_first(seen.distances())
    orders: dict[str, list[tuple[int, int]]] = {"dissimilar": ranked, "similar": ranked[::-1]}
    for seed in range(seeds):
        orders[f"random {seed}"] = random.Random(seed).sample(sorted(ranked), len(ranked))
    whole = [logits(engine, text, None) for text in read]
    unshared = [nll(one, text) for one, text in zip(whole, read, strict=True)]
    found: dict[str, Any] = {"unshared": {"perplexity": perplexity(unshared)}}
    losses: dict[tuple[str, int], list[float]] = {}
    for order, pairs in orders.items():
        cosines: list[float] = []
        chosen = seen.choose(pairs, max(sizes), partial(note, cosines))
        accepted = [cosine for cosine in cosines if cosine > LEAST_COSINE]
        for size in sizes:
            share = chosen.first(min(size, len(chosen.pairs)))
            outputs = (logits(engine, text, share) for text in read)
            judged = [
                (nll(output, text), divergence(output, right))
                for output, text, right in zip(outputs, read, whole, strict=True)
            ]
            losses[order, size] = [loss for loss, _ in judged]
            found[f"{order}, {size} layers"] = {
                "layers": len(share.pairs),
                "sources": share.sources,
                "cosine": accepted[len(share.pairs) - 1],
                "pairs_tried": len(cosines),
                "perplexity": perplexity(losses[order, size]),
                "kl": mean(kl for _, kl in judged),
            }
            typer.echo(f"{order}, {size}: {found[f'{order}, {size} layers']}")
    claims = [claim(found, losses, size, seeds) for size in sizes]
    seconds = timed(engine, share, long)
    claims.append(
        Claim(
            "kvsharer seconds per token",
            f"A step at {long} tokens takes as long with {len(share.pairs)} layers shared, within a tenth",
            {**seconds, "bytes_kept": 1 - len(share.pairs) / len(engine.shapes)},
            abs(seconds["shared"] / seconds["full"] - 1) < 0.1,
        )
    )
    settings = {"documents": documents, "tokens": tokens, "texts": texts, "seeds": seeds}
    write_systems(json_file, "kvsharer", claims, settings)


def note(cosines: list[float], pair: tuple[int, int], cosine: float) -> None:
    """Keep the cosine of a pair that was tried."""
    cosines.append(cosine)
    typer.echo(f"{pair}: {cosine:.3f}")


def claim(found: dict[str, Any], losses: dict[tuple[str, int], list[float]], size: int, seeds: int) -> Claim:
    """Of one number of layers: whether the least alike do best."""
    ours, randoms = losses["dissimilar", size], [f"random {seed}" for seed in range(seeds)]
    rows = {name: found[f"{name}, {size} layers"] for name in ("dissimilar", "similar", *randoms)}

    def against(others: Sequence[str]) -> tuple[float, float, float]:
        """By how much the log-likelihood of a token is better, in nats, by document."""
        theirs = [mean(column) for column in zip(*(losses[name, size] for name in others), strict=True)]
        return interval([(their - our, 1.0) for our, their in zip(ours, theirs, strict=True)])

    measured = {
        "unshared": found["unshared"],
        **rows,
        "nats_better_than_similar": against(["similar"]),
        "nats_better_than_random": against(randoms),
        "random_seeds_beaten": sum(rows["dissimilar"]["perplexity"] < rows[name]["perplexity"] for name in randoms),
    }
    others = [rows["similar"]["perplexity"], mean(rows[name]["perplexity"] for name in randoms)]
    return Claim(
        f"kvsharer dissimilar first, {size} layers",
        "Perplexity is lower than with most alike first, and than at random on average",
        measured,
        rows["dissimilar"]["layers"] == size and rows["dissimilar"]["perplexity"] < min(others),
    )


def logits(engine: TransformersEngine, text: Sequence[int], share: LayerMap | None) -> torch.Tensor:
    """Of every token: (tokens, vocabulary), log-probabilities; float16, to keep those of all documents."""
    with torch.inference_mode():
        output: torch.Tensor = engine.forward(cache_with(engine, len(text), share), text).logits[0]
    return output.float().log_softmax(-1).to(torch.float16)


def nll(output: torch.Tensor, text: Sequence[int]) -> float:
    """Mean negative log-likelihood of a text's tokens but the first, in nats."""
    return -float(output[:-1].float().gather(1, torch.tensor(text[1:])[:, None]).mean())


def divergence(output: torch.Tensor, right: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence from the right distributions, in nats."""
    expected = right.float()
    return float((expected.exp() * (expected - output.float())).sum(-1).mean())


def perplexity(losses: Sequence[float]) -> float:
    """Of all documents."""
    return math.exp(mean(losses))


def timed(engine: TransformersEngine, share: LayerMap, tokens: int) -> dict[str, float]:
    """Seconds of a step behind so many tokens, whose keys and values are made up; the least of some, in turns."""
    caches = {"full": cache_with(engine, tokens + STEPS, None), "shared": cache_with(engine, tokens + STEPS, share)}
    for cache in caches.values():
        cache.set_length(tokens)
        for layer in cache.stored:
            for region in layer.regions:
                region.normal_()
    found: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(STEPS):
        for name, cache in caches.items():
            began = perf_counter()
            engine.compute(cache, [5], tokens + step)
            found[name].append(perf_counter() - began)
    return {name: min(times) for name, times in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
