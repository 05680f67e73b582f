"""Stores that pack, behind a Cake: exact in every sense, and whatever is wrong with a chunk is computed instead."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.chunk import is_packed
from cakekv.engine.transformers import TransformersEngine
from cakekv.keys import ChunkKey, chunk_keys
from cakekv.load import pieces as cutting
from cakekv.results import Prefill
from cakekv.store.base import ChunkReader, Store
from cakekv.store.maintenance.walking import walk
from cakekv.store.memory import MemoryStore
from cakekv.store.packed import Pack, PackedStore

CHUNK = 64


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """5 full chunks and a suffix of 5 tokens."""
    return torch.randint(0, 211, (5 * CHUNK + 5,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest, engine: TransformersEngine) -> TransformersEngine:
    return TransformersEngine(copy.deepcopy(engine.model).to(getattr(torch, request.param)))


def cake(engine: TransformersEngine, store: Store | str, **options: Any) -> Cake:
    return Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, **options)


def sizes(store: Store, one: Cake, prompt: list[int]) -> list[int]:
    found = store.lookup(chunk_keys(one.identity, prompt))
    assert None not in found
    return [size for size in found if size is not None]


def changed(store: Store, key: ChunkKey, place: int) -> None:
    inner = next(part for part in walk(store) if not part.parts)
    with inner.open(key) as reader:
        data = memoryview(bytearray(reader.size))
        reader.read_into(data, 0)
    data[place] ^= 1
    inner.write(key, data)


def prefix_of(prefill: Prefill) -> list[torch.Tensor]:
    """Keys and values of the five chunks."""
    layers = prefill.dynamic_cache().layers
    return [plane[:, :, : 5 * CHUNK].clone() for layer in layers for plane in (layer.keys, layer.values)]


def test_the_same_bits_in_fewer_bytes(model: TransformersEngine, prompt: list[int], tmp_path: Path) -> None:
    read, placed = {}, {}
    for pack in ("no", "yes"):
        place = f"file://{tmp_path}/{pack}?pack={pack}"
        with cake(model, place) as one:
            exact = one.prefill(prompt)
            assert one.wait_saved().error is None
        with cake(model, place) as other:
            restored = other.prefill(prompt, mode="load")
        torch.testing.assert_close(restored.logits.float(), exact.logits.float(), rtol=0.05, atol=0.05)
        assert restored.report.exact
        assert restored.report.lossy_tokens == 0
        assert restored.report.loaded_tokens == 5 * CHUNK
        read[pack] = sum(restored.report.bytes_by_tier.values())
        placed[pack] = prefix_of(restored)
    assert read["yes"] < 0.95 * read["no"]
    assert all(map(torch.equal, placed["no"], placed["yes"]))


def test_what_is_computed_behind_packed_chunks_is_saved(model: TransformersEngine, prompt: list[int]) -> None:
    store = PackedStore(MemoryStore(), Pack.YES)
    longer = [*prompt, *prompt[:100]]
    with cake(model, store) as one:
        one.prefill(prompt)
        one.wait_saved()
        report = one.prefill(longer, mode="load").report
        assert report.loaded_tokens == 5 * CHUNK
        saved = one.wait_saved()
        assert saved.saved_chunks == len(longer) // CHUNK
        assert all(is_packed(size) for size in sizes(store, one, longer))


def test_a_store_from_before(model: TransformersEngine, prompt: list[int], tmp_path: Path) -> None:
    with cake(model, f"file://{tmp_path}?pack=no") as one:
        exact = one.prefill(prompt[: 3 * CHUNK + 1])
        one.wait_saved()
    with cake(model, f"file://{tmp_path}?pack=yes") as other:
        restored = other.prefill(prompt[: 3 * CHUNK + 1], mode="load")
        assert restored.report.loaded_tokens == 3 * CHUNK
        torch.testing.assert_close(restored.logits.float(), exact.logits.float(), rtol=0.05, atol=0.05)
        other.prefill(prompt, mode="load")
        other.wait_saved()
        forms = [is_packed(size) for size in sizes(other.tiers[0], other, prompt)]
        again = other.prefill(prompt, mode="load")
    assert forms == [False] * 3 + [True] * 2
    assert again.report.loaded_tokens == 5 * CHUNK
    assert again.report.exact


def test_damage_is_found_and_computed(model: TransformersEngine, prompt: list[int]) -> None:
    store = PackedStore(MemoryStore(), Pack.YES)
    with cake(model, store) as one:
        exact = one.prefill(prompt)
        one.wait_saved()
        keys = chunk_keys(one.identity, prompt)
        changed(store, keys[1], 4100)
        changed(store, keys[3], 50)
        restored = one.prefill(prompt, mode="load", save=False)
    reasons = restored.report.miss_reasons()
    assert any(reason.startswith("corrupt: segment checksum") for reason in reasons)
    assert any(reason.startswith("corrupt: header checksum") for reason in reasons)
    assert restored.report.loaded_tokens == 3 * CHUNK
    torch.testing.assert_close(restored.logits.float(), exact.logits.float(), rtol=0.05, atol=0.05)


def test_a_chunk_of_another_shape_is_found(engine: TransformersEngine, prompt: list[int]) -> None:
    """Sound, of this key and position, and of a model with more bytes a token."""
    from cakekv.chunk import ChunkShape, seal
    from cakekv.packed_chunk import pack_chunk

    store = MemoryStore()
    with cake(engine, store) as one:
        one.prefill(prompt)
        one.wait_saved()
        keys = chunk_keys(one.identity, prompt)
        wide = ChunkShape(CHUNK, tuple(2 * size for size in one._coder.exact.segment_bytes))
        chunk = memoryview(bytearray(wide.total_bytes))
        seal(wide, chunk, keys[2], 2 * CHUNK)
        packed = pack_chunk(chunk)
        assert packed is not None
        store.write(keys[2], packed)
        report = one.prefill(prompt, mode="load", save=False).report
    assert report.loaded_tokens == 4 * CHUNK
    assert any(reason.startswith("corrupt: wrong shape") for reason in report.miss_reasons())


@pytest.mark.parametrize("recipe", ["int8:window=128", "kivi:bits=2,window=128", "cachegen"])
def test_lossy_codecs_keep_their_newest_tokens_exact(
    engine: TransformersEngine, prompt: list[int], recipe: str
) -> None:
    """Their codes are stored as they are; what they leave exact is packed, and told from codes by its size alone."""
    store, plain = PackedStore(MemoryStore(), Pack.YES), MemoryStore()
    results = []
    for place in (plain, store):
        with cake(engine, place, codec=recipe) as one:
            one.prefill(prompt)
            one.wait_saved()
            results.append(one.prefill(prompt, mode="load", save=False))
            found = [is_packed(size) for size in sizes(place, one, prompt)]
    raw, packed = results
    assert torch.equal(raw.logits, packed.logits)
    assert raw.report.lossy_tokens == packed.report.lossy_tokens
    assert raw.report.loaded_tokens == packed.report.loaded_tokens == 5 * CHUNK
    exact = (raw.report.loaded_tokens - raw.report.lossy_tokens) // CHUNK
    assert found == [False] * (5 - exact) + [True] * exact
    with cake(engine, store, codec=recipe) as other:  # its window reaches chunks that are codes: those will not do
        shorter = other.prefill(prompt[: 3 * CHUNK + 1], mode="load", save=False).report
    assert shorter.loaded_tokens == shorter.lossy_tokens


class Paced(TransformersEngine):
    """Computes no faster than 2 ms a token, so that slow loads are worth something."""

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        time.sleep(0.002 * len(token_ids))
        return super().compute(cache, token_ids, start, gate)


class Slow(MemoryStore):
    """80 ms before a chunk is open."""

    def open(self, key: ChunkKey) -> ChunkReader:
        time.sleep(0.08)
        return super().open(key)


def test_layered_finish(engine: TransformersEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of packed chunks, read while the suffix is computed, are unpacked into their places."""
    monkeypatch.setattr(cutting, "_LEAST_READ_BYTES", 1)
    end = 5 * CHUNK
    long = prompt[:end] + [3, 1, 4, 1, 5, 9, 2, 6] * 20
    store = PackedStore(Slow(), Pack.YES)
    with cake(engine, store) as one:
        exact = one.prefill(prompt[: end + 1])
        one.wait_saved()
        assert all(is_packed(size) for size in sizes(store, one, prompt))
    pieces = 0
    with cake(Paced(engine.model), store) as other:
        for _ in range(40):  # until one was finished in layers: the first teaches what both arms cost
            mixed = other.prefill(long, mode="both", save=False)
            pieces += sum(load.group is not None and load.outcome == "placed" for load in mixed.report.loads)
            assert mixed.report.exact
            for layer, first in zip(mixed.cache.stored, exact.cache.stored, strict=True):
                for region, same in zip(layer.regions, first.regions, strict=True):
                    assert torch.allclose(region[:, :end], same[:, :end], atol=1e-4)
            again = engine.compute(mixed.cache, long[end:], end)
            assert torch.allclose(mixed.logits, again, atol=1e-4)
            if pieces:
                break
    assert pieces


def test_without_numba_packed_chunks_are_computed(
    engine: TransformersEngine, prompt: list[int], request: pytest.FixtureRequest
) -> None:
    store = PackedStore(MemoryStore(), Pack.YES)
    with cake(engine, store) as one:
        exact = one.prefill(prompt)
        one.wait_saved()
    request.getfixturevalue("without_numba")
    with cake(engine, store) as other:
        restored = other.prefill(prompt, mode="load", save=False)
    assert restored.report.loaded_tokens == 0
    assert any("pip install 'cakekv[codecs]'" in reason for reason in restored.report.miss_reasons())
    torch.testing.assert_close(restored.logits, exact.logits, rtol=1e-4, atol=1e-4)
