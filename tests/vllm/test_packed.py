"""Packed chunks in a real engine: what lies in the cache afterwards is what was computed, bit for bit.

Tests with an engine of their own come first: there is room for one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import BLOCK, PATIENCE_S, TinyEngine, closing, prompt, sampling, scripted

from cakekv.chunk import is_packed, segments
from cakekv.store.packed import PackedStore, packers

CHUNKS = 7


def blocks_of(engine: TinyEngine, request: str, chunks: int) -> list[list[bytes]]:
    """Per chunk and layer, what lies in the blocks of a request."""
    shard = engine.worker.shards[0]
    block_ids = engine.scheduler.kv_cache_manager.get_block_ids(engine.internal(request).request_id)[0]
    blocks = BLOCK // engine.scheduler.block_size
    found = []
    for chunk in range(chunks):
        buffer = memoryview(bytearray(shard.coder.exact.total_bytes))
        shard.gather(block_ids[chunk * blocks : (chunk + 1) * blocks], buffer)()
        found.append([bytes(part) for part in segments(shard.coder.exact, buffer)])
    return found


def emptied(engine: TinyEngine, mode: str) -> None:
    engine.settle()
    assert engine.core.reset_prefix_cache()
    engine.fill_cache(0)
    engine.set(mode=mode)
    engine.expect()


def run_to_the_end_of_the_prompt(engine: TinyEngine) -> str:
    request = engine.add(prompt(1000), sampling(2))
    engine.until(lambda: engine.internal(request).num_computed_tokens >= 1000)
    return request


def test_with_a_codec_what_it_leaves_exact_is_packed(model: Path, plain: dict[int, list[int]]) -> None:
    """The newest 128 tokens of "kivi" come back through the planes' order."""
    store = scripted("packed-codec")
    options = {"store": "scripted://packed-codec?pack=yes", "codec": "kivi:bits=4", "load_deadline": PATIENCE_S}
    with closing(TinyEngine(model, options, dtype="bfloat16")) as engine:
        request = run_to_the_end_of_the_prompt(engine)
        computed = blocks_of(engine, request, CHUNKS)
        engine.finish(request)
        engine.settle()
        assert sum(is_packed(chunk.size) for chunk in store) == 1
        emptied(engine, "load")
        request = run_to_the_end_of_the_prompt(engine)
        assert blocks_of(engine, request, CHUNKS)[-1] == computed[-1]
        engine.finish(request)
        engine.settle()
        report = engine.report()
        assert (report.loaded_tokens, report.lossy_tokens) == (CHUNKS * BLOCK, (CHUNKS - 1) * BLOCK)
        engine.assert_nothing_leaked()


def test_layer_by_layer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks long enough to be worth it: pieces are unpacked as they come."""
    ids = prompt(2600)
    options = {"store": "scripted://packed-pieces?pack=yes", "chunk_tokens": 512, "layered_finish": True}
    store = scripted("packed-pieces")
    with closing(TinyEngine(model, options)) as engine:
        expected = engine.run(ids)
        engine.settle()
        assert all(is_packed(chunk.size) for chunk in store)
        emptied(engine, "auto")
        engine.expect(compute_s=5.12, load_s=0.05)  # so that all is loaded but the suffix
        store.gate.clear()
        wait = engine.worker.loads.wait
        monkeypatch.setattr(engine.worker.loads, "wait", lambda *awaited: store.gate.set() or wait(*awaited))
        assert engine.run(ids) == expected
        engine.settle()
        report = engine.report()
        assert any(load.group is not None for load in report.loads)
        assert (report.loaded_tokens, report.lossy_tokens) == (2560, 0)
        engine.assert_nothing_leaked()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[TinyEngine]:
    """An engine whose store packs; a prompt of 1000 tokens is stored."""
    name = f"packed-{request.param}"
    options = {"store": f"scripted://{name}?pack=yes", "load_deadline": PATIENCE_S}
    with closing(TinyEngine(model, options, dtype=request.param)) as engine:
        engine.store = scripted(name)
        one = run_to_the_end_of_the_prompt(engine)
        engine.computed = blocks_of(engine, one, CHUNKS)
        engine.tokens = engine.finish(one)[0]
        engine.settle()
        yield engine


def test_chunks_are_packed(engine: Any) -> None:
    exact = engine.worker.shards[0].coder.exact.total_bytes
    assert [is_packed(chunk.size) for chunk in engine.store] == [True] * CHUNKS
    assert all(chunk.size < 0.95 * exact for chunk in engine.store)
    [packer] = packers(engine.half.tiers[0])
    assert isinstance(packer, PackedStore)


@pytest.mark.parametrize("missing", [0, 3, 6])
def test_the_same_bits_lie_in_the_blocks(engine: Any, missing: int) -> None:
    """With the front computed, and the rest loaded; nothing of it is lossy."""
    emptied(engine, "load")
    request = engine.add(prompt(1000), sampling(2))
    keys = engine.shard_keys(request)
    engine.finish(request)
    emptied(engine, "load")
    stored = {key: engine.store.content(key) for key in keys}
    engine.store.inner.delete(keys[:missing])
    request = run_to_the_end_of_the_prompt(engine)
    found = blocks_of(engine, request, CHUNKS)
    assert engine.finish(request) == [engine.tokens]
    engine.settle()
    assert found[missing:] == engine.computed[missing:]
    report = engine.report()
    assert report.loaded_tokens == (CHUNKS - missing) * BLOCK
    assert report.lossy_tokens == 0
    assert report.exact
    for key, data in stored.items():
        engine.store.inner.write(key, memoryview(data))
    engine.assert_nothing_leaked()


def test_a_damaged_chunk_is_computed(engine: Any) -> None:
    emptied(engine, "load")
    request = engine.add(prompt(1000), sampling(2))
    keys = engine.shard_keys(request)
    engine.finish(request)
    emptied(engine, "load")
    sound = engine.store.content(keys[2])
    engine.store.damage(keys[2], 5000)
    assert engine.run(prompt(1000), sampling(2)) == engine.tokens
    engine.settle()
    report = engine.report()
    assert report.loaded_tokens == (CHUNKS - 1) * BLOCK
    assert any(reason.startswith("corrupt: segment checksum") for reason in report.miss_reasons())
    engine.store.write(keys[2], memoryview(sound))
