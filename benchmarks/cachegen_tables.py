"""How many bits `cachegen` takes per element, and how many it would with tables that are learned once per model.

The tables are learned on some documents and used on others: one per layer and plane, or one per channel, as in
CacheGen's paper (arXiv 2310.07240). Both sides are without what they have in common, the scales of tokens.

    python benchmarks/cachegen_tables.py --json benchmarks/cachegen_tables.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cakekv.bench.machine import describe_run
from cakekv.bench.quality.documents import Document, make_documents
from cakekv.cli.console import write_json
from cakekv.codec.base import Plane, Values
from cakekv.codec.cachegen import STEPS, CacheGen, shrunk
from cakekv.demo.model import demo_model
from cakekv.engine.transformers import TransformersEngine, load_tokenizer

_SPAN = 512
_CONTINUATION = 128
"""Tokens that belong to each document and are not used, so that documents are those of `cakekv quality`."""
_SYMBOLS = 2 * max(steps for pair in STEPS.values() for steps in pair) + 1
_UNSEEN = 0.5
"""Times that every symbol counts as seen beforehand, so that none is impossible."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learn", type=int, default=4, help="documents that tables are learned on")
    parser.add_argument("--documents", type=int, default=2, help="other documents, that they are used on")
    parser.add_argument("--tokens", type=int, default=1024, help="of each document")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = TransformersEngine.from_pretrained(demo_model(), dtype="float32")
    tokenizer = load_tokenizer(demo_model())
    made = make_documents(tokenizer, options.learn + options.documents, options.tokens, _CONTINUATION)
    planes = [cached(engine, document) for document in made]
    rows = []
    for level in STEPS:
        codec = CacheGen(level=level)
        tables = learn(codec, planes[: options.learn])
        others = planes[options.learn :]
        for chunk_tokens in options.chunk_tokens:
            rows.append({"level": level, "chunk_tokens": chunk_tokens} | compare(codec, tables, others, chunk_tokens))
            print(*(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {**describe_run(), "settings": settings, "rows": rows})


def cached(engine: TransformersEngine, document: Document) -> list[tuple[Values, Values]]:
    """Keys and values of a document's context by layer, (heads, tokens, width)."""
    tokens = len(document.context)
    cache = engine.new_cache(tokens)
    for start in range(0, tokens, _SPAN):
        engine.compute(cache, document.context[start : start + _SPAN], start)
    segments: list[Any] = [memoryview(bytearray(size)) for size in engine.layout.segment_bytes(tokens)]
    engine.gather(cache, 0, tokens, segments)
    pairs = []
    for layer, segment in zip(engine.layout.layers, segments, strict=True):
        keys, values = layer.planes
        found = np.frombuffer(segment, np.float32)
        split = keys.heads * tokens * keys.width
        pairs.append(
            (
                found[:split].reshape(keys.heads, tokens, keys.width),
                found[split:].reshape(values.heads, tokens, values.width),
            )
        )
    return pairs


def plane_of(values: Values, index: int, layer: int, layers: int) -> Plane:
    heads, tokens, width = values.shape
    return Plane("values" if index else "keys", layer, layers, heads, tokens, width)


def symbols(codec: CacheGen, plane: Plane, values: Values) -> npt.NDArray[np.int64]:
    """What is coded of each element, from 0 on: (channels, tokens)."""
    steps, values = codec.steps(plane), shrunk(values)
    scale = np.abs(values).max(axis=(0, 2), keepdims=True) / steps
    levels: npt.NDArray[np.int64] = np.rint(values / np.maximum(scale, 1e-30)).astype(np.int64) + _SYMBOLS // 2
    return levels.transpose(0, 2, 1).reshape(-1, plane.tokens)


def learn(codec: CacheGen, documents: list[list[tuple[Values, Values]]]) -> dict[tuple[int, int], Any]:
    """How often each symbol is seen by layer and plane: (channels, symbols)."""
    seen: dict[tuple[int, int], Any] = {}
    for document in documents:
        for layer, pair in enumerate(document):
            for index, values in enumerate(pair):
                found = symbols(codec, plane_of(values, index, layer, len(document)), values)
                channels = np.arange(len(found))[:, None]
                counts = np.bincount((channels * _SYMBOLS + found).reshape(-1), minlength=len(found) * _SYMBOLS)
                seen[layer, index] = seen.get((layer, index), 0) + counts.reshape(-1, _SYMBOLS)
    return seen


def compare(
    codec: CacheGen, tables: dict[tuple[int, int], Any], documents: list[list[tuple[Values, Values]]], tokens: int
) -> dict[str, float]:
    """Bits per element: as the codec writes them, and by tables per channel, and per layer and plane."""
    bits = {"codec": 0.0, "per_channel": 0.0, "per_layer": 0.0}
    elements = 0
    for document in documents:
        for layer, pair in enumerate(document):
            for index, values in enumerate(pair):
                costs = [_cost(tables[layer, index]), _cost(tables[layer, index].sum(axis=0, keepdims=True))]
                for start in range(0, values.shape[1] - tokens + 1, tokens):
                    part = np.ascontiguousarray(values[:, start : start + tokens])
                    plane = plane_of(part, index, layer, len(document))
                    code = np.empty(codec.size(plane), np.uint8)
                    bits["codec"] += 8 * (codec.encode(plane, part, code) - 2 * tokens)
                    found = symbols(codec, plane, part)
                    bits["per_channel"] += float(np.take_along_axis(costs[0], found, axis=1).sum())
                    bits["per_layer"] += float(costs[1][0, found].sum())
                    elements += plane.elements
    return {name: total / elements for name, total in bits.items()}


def _cost(seen: Any) -> Any:
    """Bits of each symbol, (rows, symbols)."""
    weights = seen + _UNSEEN
    return np.log2(weights.sum(axis=1, keepdims=True) / weights)


if __name__ == "__main__":
    main()
