"""What the state of LESS makes up for, of what sinks and the newest tokens alone lose, on the demo's model.

    python benchmarks/less.py --json benchmarks/decode.json
    python benchmarks/less.py --json benchmarks/decode.json --add --also 2048    # one gap more, the rest stays

*Error* is the mean square difference of a layer's attention from full attention, after the output projection, on texts
that no kernel has seen; *gap* is the Kullback-Leibler divergence of the next token's distribution from that of the full
cache, step by step along a continuation. The fair comparison is with four tokens more, which take the state's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.quality.intervals import interval
from cakekv.bench.systems import Claim, write_systems
from cakekv.codec.texts import learning_texts
from cakekv.compress.sink_recent import SinkRecent
from cakekv.decode.less import Less
from cakekv.decode.less_kernels import Learned, find_kernels
from cakekv.decode.less_training import FAIR, collect, error_of, example, output_of
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer

SINKS = 4
ALSO = (448, 2048)
STEPS = 12
PASSAGE = 64
"""Tokens that two texts have in common by more than a licence at their beginning."""
SPARE = 3
"""Documents to choose among."""


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here, beside those of other systems.")],
    documents: Annotated[int, typer.Option(min=2, help="How many.")] = 24,
    tokens: Annotated[int, typer.Option(min=256, help="Of each.")] = 1024,
    continuation: Annotated[int, typer.Option(min=1, help="Steps along which the gap is measured.")] = 32,
    also: Annotated[
        list[int] | None, typer.Option(min=256, help="Lengths at which only the gap is measured; repeatable.")
    ] = None,
    recent: Annotated[int, typer.Option(min=1, help="Newest tokens that are kept; sinks come on top.")] = 60,
    long: Annotated[int, typer.Option(min=256, help="Tokens before the steps that are timed.")] = 7000,
    add_gaps: Annotated[bool, typer.Option("--add", help="Measure only the gaps at --also.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two short documents, to see that it works.")] = False,
) -> None:
    """Measure LESS against what it replaces, in float32."""
    if tiny:
        documents, tokens, also, continuation, long = 2, 256, [300], 2, 300
    engine = TransformersEngine.from_pretrained(demo_model(), dtype="float32")
    learned, tokenizer = find_kernels(engine.weights_names()), load_tokenizer(demo_model())
    others = also or ALSO
    lengths, run = ((*others,), f" {', '.join(map(str, others))} tokens") if add_gaps else ((tokens, *others), "")
    settings: dict[str, Any] = {"documents": documents, "tokens": lengths[0], "continuation": continuation}
    settings |= {"sinks": SINKS, "recent": recent, "kernels": learned.digest}
    claims = []

    def add(claim: Claim) -> None:
        claims.append(claim)
        shown = {key: one for key, one in claim.measured.items() if key != "layers"}
        typer.echo(f"{claim.name}: {shown}")
        write_systems(json_file, "less", claims, settings, run)

    for length in dict.fromkeys(lengths):
        read = held_out(tokenizer, learned, documents, length, continuation)
        add(gap_claim("less gap" if length == tokens else f"less gap, {length} tokens", engine, learned, read, recent))
        if length == tokens:
            layers = errors(engine, learned, read, recent)
            better = sum(one["less"] < one["four_more"] for one in layers.values()) / len(layers)
            claim = f"The held-out error is below that of {FAIR} more tokens in at least 80 % of layers"
            add(Claim("less error", claim, {"layers_better": better, "layers": layers}, better >= 0.8))
    if add_gaps:
        return
    seconds = timed(engine, learned, long, recent)
    claim = f"A step at {long} tokens is faster than over the full cache"
    add(Claim("less seconds per token", claim, seconds, seconds["less"] < seconds["full"]))


def gap_claim(name: str, engine: TransformersEngine, learned: Learned, read: list[Document], recent: int) -> Claim:
    """Whether a state makes up for a fifth of the divergence on these documents."""
    gaps = [gap(engine, learned, document, recent) for document in read]
    means = {way: sum(one[way] for one in gaps) / len(gaps) for way in gaps[0]}
    recovered = [(1 - one["less"] / one["without"], one["without"]) for one in gaps]
    return Claim(
        name,
        "The divergence from the full cache is at least 20 % less than without a state",
        {
            "tokens": len(read[0].context),
            "documents": len(read),
            "kl": means,
            "reduction": 1 - means["less"] / means["without"],
            "reduction_of_four_more": 1 - means["four_more"] / means["without"],
            "reduction_by_document": interval(recovered),
            "documents_better": sum(one > 0 for one, _ in recovered) / len(recovered),
        },
        means["less"] <= 0.8 * means["without"],
    )


def held_out(tokenizer: Any, learned: Learned, count: int, tokens: int, continuation: int) -> list[Document]:
    """Documents that have no long passage in common with what the kernels were learned from, which some do."""
    known: set[tuple[int, ...]] = set()
    for kind in ("", "tuned_"):
        if f"{kind}documents" in learned.about:
            many, long = (int(learned.about[f"{kind}{one}"]) for one in ("documents", "tokens"))
            texts = learning_texts(tokenizer, many, long)
            known.update(passage for text in texts for passage in passages(text))
    made = make_documents(tokenizer, count + SPARE, tokens, continuation)
    return [one for one in made if known.isdisjoint(passages(one.context + one.continuation))][:count]


def passages(text: list[int]) -> Iterator[tuple[int, ...]]:
    """Every run of so many tokens."""
    return (tuple(text[at : at + PASSAGE]) for at in range(len(text) - PASSAGE + 1))


def errors(
    engine: TransformersEngine, learned: Learned, read: list[Document], recent: int
) -> dict[str, dict[str, float]]:
    """Of each layer: the error without a state, with more tokens, and with a state."""
    found = {}
    for layer in collect(engine, [document.context for document in read]):
        kernels, sums = learned.layers[layer.number], {"without": 0.0, "four_more": 0.0, "less": 0.0}
        for text in layer.texts:
            one = example(layer, text, SINKS, recent, judged=True)
            assert one.more is not None
            for way, output in (("without", one.kept), ("four_more", one.more), ("less", output_of(kernels, one))):
                sums[way] += error_of([output], [one], layer.gram) / len(layer.texts)
        found[str(layer.number)] = sums
    return found


def gap(engine: TransformersEngine, learned: Learned, document: Document, recent: int) -> dict[str, float]:
    """Mean divergence from the full cache, in nats, of each way, along a document's continuation."""
    context, rest = document.context, document.continuation
    cache = engine.new_cache(len(context) + len(rest))
    engine.compute(cache, context, 0)
    ways: dict[str, Any] = {
        "without": engine.compress(cache, context, SinkRecent(sinks=SINKS, recent=recent)),
        "four_more": engine.compress(cache, context, SinkRecent(sinks=SINKS, recent=recent + FAIR)),
        "less": engine.look(cache, context, Less(SINKS, recent).with_kernels(learned)),
    }
    sums = dict.fromkeys(ways, 0.0)
    for position, token in enumerate(rest, len(context)):
        expected = engine.compute(cache, [token], position).log_softmax(-1)
        for way, left in ways.items():
            found = engine.compute(left, [token], position).log_softmax(-1)
            sums[way] += float((expected.exp() * (expected - found)).sum()) / len(rest)
    return sums


def timed(engine: TransformersEngine, learned: Learned, tokens: int, recent: int) -> dict[str, float]:
    """Seconds of a step behind so many tokens, whose keys and values are made up; the least of some, in turns."""
    cache = engine.new_cache(tokens + STEPS)
    for layer in cache.stored:
        for region in layer.regions:
            region.normal_()
    cache.set_length(tokens)
    ids = [5] * tokens
    less = engine.look(cache, ids, Less(SINKS, recent).with_kernels(learned))
    alone = engine.compress(cache, ids, SinkRecent(sinks=SINKS, recent=recent))
    ways = {"full": cache, "without": alone, "less": less}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(STEPS):
        for way, where in ways.items():
            began = perf_counter()
            engine.compute(where, [5], tokens + step)
            found[way].append(perf_counter() - began)
    return {way: min(times) for way, times in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
