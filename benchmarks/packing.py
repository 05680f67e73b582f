"""What packing saves, and how fast one core packs and unpacks, on a model's cache of a document.

    python benchmarks/packing.py --json benchmarks/packing.json

Each layer of each chunk is packed by itself, as in stores. Rates are of raw bytes, by one thread: medians of passes
over the whole cache. `entropy_ratio` is the ratio if exponents took their entropy, each plane of each segment by
itself, and all else its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer

from cakekv.bench.machine import describe_run
from cakekv.cli.console import number_list, write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.engine.base import Engine
from cakekv.packing import bound, pack, unpack

EXPONENTS = {"bfloat16": (16, 7, 8), "float16": (16, 10, 5), "float32": (32, 23, 8)}
"""Bits of an element, those below its exponent, and those of its exponent."""
TARGETS = {"ratio": 1.45, "encode_gbps": 0.4, "decode_gbps": 1.0}
"""For bfloat16."""


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the document.")] = 1024,
    chunks: Annotated[str, typer.Option(help="Tokens per chunk.")] = "64,256",
    repeats: Annotated[int, typer.Option(min=1, help="Passes over the cache.")] = 9,
) -> None:
    """Measure packing in every dtype."""
    data: dict[str, Any] = {**describe_run(), "model": model, "tokens": tokens, "points": []}
    for dtype in EXPONENTS:
        with load_cake(model, None, dtype=dtype) as cake:
            token_ids = [int(token) for token in cake.tokenizer(read_document("demo", cake.tokenizer))["input_ids"]]
            for chunk_tokens in number_list(chunks, int, "chunks"):
                found = measure(segments_of(cake.engine, token_ids[:tokens], chunk_tokens), dtype, repeats)
                data["points"].append({"dtype": dtype, "tokens": chunk_tokens, **found})
                print(*(f"{name} {value}" for name, value in data["points"][-1].items()), flush=True)
    if json_file:
        write_json(json_file, data)
    for point in data["points"]:
        if point["dtype"] == "bfloat16":
            missed = [name for name, aim in TARGETS.items() if point[name] < aim]
            print(f"chunks of {point['tokens']} tokens: targets {'missed: ' + ', '.join(missed) if missed else 'met'}")


def segments_of(engine: Engine[Any, Any], token_ids: Sequence[int], chunk_tokens: int) -> list[list[memoryview]]:
    """Every layer of every whole chunk of a prompt, as its planes, which follow one another in memory."""
    cache = engine.new_cache(len(token_ids))
    engine.compute(cache, token_ids, 0)
    found = []
    for start in range(0, len(token_ids) - chunk_tokens + 1, chunk_tokens):
        segments = [memoryview(bytearray(size)) for size in engine.layout.segment_bytes(chunk_tokens)]
        engine.gather(cache, start, chunk_tokens, segments)
        for layer, segment in zip(engine.layout.layers, segments, strict=True):
            ends = np.cumsum([0, *(chunk_tokens * plane.token_bytes for plane in layer.planes)])
            found.append([segment[begin:end] for begin, end in pairwise(ends)])
    return found


def measure(segments: Sequence[Sequence[memoryview]], dtype: str, repeats: int) -> dict[str, Any]:
    """Pack and unpack all segments again and again.

    Returns
    -------
    dict
        "ratio" and "entropy_ratio"; "encode_gbps" and "decode_gbps", GB/s of raw bytes; "identical": every segment came
        back bit for bit.
    """
    raw = [memoryview(b"".join(planes)) for planes in segments]
    total = sum(len(segment) for segment in raw)
    rooms = [memoryview(bytearray(bound(len(segment)))) for segment in raw]
    packed = [room[: pack(segment, room)] for segment, room in zip(raw, rooms, strict=True)]
    unpacked = memoryview(bytearray(max(len(segment) for segment in raw)))

    def identical(segment: memoryview, code: memoryview) -> bool:
        unpacked[:] = bytes(len(unpacked))
        unpack(code, unpacked[: len(segment)])
        return bytes(unpacked[: len(segment)]) == bytes(segment)

    def pack_all() -> None:
        for segment, room in zip(raw, rooms, strict=True):
            pack(segment, room)

    def unpack_all() -> None:
        for segment, code in zip(raw, packed, strict=True):
            unpack(code, unpacked[: len(segment)])

    same = all(identical(segment, code) for segment, code in zip(raw, packed, strict=True))
    seconds = [(_seconds(pack_all), _seconds(unpack_all)) for _ in range(repeats)]
    encode_s, decode_s = (median(column) for column in zip(*seconds, strict=True))
    return {
        "ratio": total / sum(len(code) for code in packed),
        "entropy_ratio": 8 * total / sum(_least_bits(plane, dtype) for planes in segments for plane in planes),
        "encode_gbps": 1e-9 * total / encode_s,
        "decode_gbps": 1e-9 * total / decode_s,
        "identical": same,
    }


def _seconds(work: Callable[[], None]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _least_bits(plane: memoryview, dtype: str) -> float:
    """Bits of a plane whose exponents take their entropy."""
    bits, below, exponent_bits = EXPONENTS[dtype]
    elements = np.frombuffer(plane, f"<u{bits // 8}")
    counts = np.bincount((elements >> below) & (2**exponent_bits - 1))
    counts = counts[counts > 0]
    return float((bits - exponent_bits) * elements.size - (counts * np.log2(counts / elements.size)).sum())


if __name__ == "__main__":
    typer.run(main)
