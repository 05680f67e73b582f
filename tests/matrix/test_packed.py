"""Packed chunks restore every family of models to the same bits as raw ones, wherever compute and loads meet."""

from __future__ import annotations

import pytest
import torch

from cakekv import packing
from cakekv.cake import Cake
from cakekv.chunk import ChunkShape, Form, seal, segments, verify_chunk
from cakekv.engine.transformers import TransformersEngine
from cakekv.keys import chunk_keys
from cakekv.results import Prefill
from cakekv.store.memory import MemoryStore
from tests.matrix.models import CONFIGS, VOCABULARY, build

CHUNK, CHUNKS = 32, 5
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *((name, BFLOAT16) for name in CONFIGS),
    *((name, dtype) for name in ("llama", "gemma3", "gemma3n", "deepseek-v3") for dtype in (FLOAT16, FLOAT32)),
]


def packed(chunk: memoryview) -> memoryview:
    """As `pack_chunk`, but for that these chunks are so small that packing need not make them smaller."""
    header = verify_chunk(chunk)
    parts = []
    for segment in segments(header.shape, chunk):
        room = memoryview(bytearray(packing.bound(len(segment))))
        parts.append(room[: packing.pack(segment, room)] if len(segment) else segment)
    shape = ChunkShape(header.tokens, tuple(map(len, parts)), Form.PACKED, header.lengths)
    made = memoryview(bytearray(shape.total_bytes))
    for segment, part in zip(segments(shape, made), parts, strict=True):
        segment[:] = part
    seal(shape, made, header.key, header.position)
    return made


def restored(engine: TransformersEngine, prompt: list[int], chunks: list[memoryview]) -> Prefill:
    store = MemoryStore()
    for chunk in chunks:
        store.write(verify_chunk(chunk).key, chunk)
    with Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=256) as cake:
        return cake.prefill(prompt, mode="load", save=False)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda part: str(part).removeprefix("torch."))
def test_every_meeting_point(name: str, dtype: torch.dtype) -> None:
    engine = TransformersEngine(build(name, dtype))
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(3, VOCABULARY, (CHUNK * CHUNKS + 5,), generator=generator).tolist()
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=256) as cake:
        cake.prefill(prompt)
        assert cake.wait_saved().error is None
        keys = chunk_keys(cake.identity, prompt)
    raw = []
    for key in keys:
        with store.open(key) as reader:
            raw.append(memoryview(bytearray(reader.size)))
            reader.read_into(raw[-1], 0)
    for meeting in range(CHUNKS):
        one = restored(engine, prompt, raw[meeting:])
        other = restored(engine, prompt, [packed(chunk) for chunk in raw[meeting:]])
        for result in (one, other):
            assert result.report.loaded_tokens == (CHUNKS - meeting) * CHUNK
            assert result.report.exact
        assert torch.equal(one.logits, other.logits)
        for first, second in zip(one.cache.stored, other.cache.stored, strict=True):
            for region, same in zip(first.regions, second.regions, strict=True):
                end = CHUNK * CHUNKS
                assert torch.equal(region[:, :end].view(torch.uint8), same[:, :end].view(torch.uint8))
