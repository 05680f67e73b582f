"""How fast chunks are decoded, on CPU cores and on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from cakekv.chunk import read_header, segments
from cakekv.codec import codec_named
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.elements import to_elements
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded

if TYPE_CHECKING:
    from cakekv.codec.on_device import DeviceDecoder
    from cakekv.engine.base import Engine

_KEY = ChunkKey(bytes(ChunkKey.LENGTH))


def decoding_speeds(
    engine: Engine[Any, Any], chunk_tokens: int, recipes: Sequence[str], repeats: int = 20
) -> list[dict[str, Any]]:
    """Decode a chunk of random keys and values again and again.

    Parameters
    ----------
    engine : Engine
        Whose chunks, and on whose device.
    chunk_tokens : int
        Tokens per chunk.
    recipes : sequence of str
        As for `codec_named`.
    repeats : int
        Medians count.

    Returns
    -------
    list of dict
        Per recipe: its name; "exact_bytes" and "coded_bytes" of a chunk's segments; "cores_gbps" and "device_gbps",
        GB/s of the exact form, for one thread and for the device with the copy to it (None if it does not decode that).
    """
    dtype = engine.identity(chunk_tokens).dtype
    rng = np.random.default_rng(0)
    found = []
    for recipe in recipes:
        coder = ChunkCoder(codec_named(recipe), engine.layout, chunk_tokens, dtype, engine.rotations)
        coder.warm_up()
        exact, coded = (engine.staging(coder.exact.total_bytes) for _ in range(2))
        for layer, segment in enumerate(segments(coder.exact, exact)):
            elements = sum(plane.elements for plane in coder.planes_of(layer))
            to_elements(rng.standard_normal(elements, np.float32), dtype, np.frombuffer(segment, np.uint8))
        chunk = coder.encode(exact, coded, _KEY, 0)
        figures: dict[str, Any] = {"recipe": recipe, "exact_bytes": sum(coder.exact.segment_bytes)}
        decoders: dict[str, DeviceDecoder | None] = {"cores": None, "device": engine.decoder(coder)}
        for name, decoder in decoders.items():
            figures[f"{name}_gbps"] = None
            if chunk is None or (name == "device" and decoder is None):
                continue
            took = []
            for _ in range(repeats):
                began = perf_counter()
                decoded(coder, chunk, exact, decoder)
                took.append(perf_counter() - began)
            figures[f"{name}_gbps"] = figures["exact_bytes"] / median(took) / 1e9
        coded_bytes = None if chunk is None else sum(read_header(chunk, len(chunk)).shape.segment_bytes)
        found.append(figures | {"coded_bytes": coded_bytes})
    return found
