"""Codecs in an engine: what they load is close, what they say about it is true, and exact keys stay exact."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.codec import CODECS, codec_named
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey, chunk_keys
from cakekv.load import pieces as cutting
from cakekv.store.base import ChunkReader, Store
from cakekv.store.memory import MemoryStore

CHUNK = 32
LOSSY = [name for name in CODECS if codec_named(name).lossy]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest, make_engine: Callable[[str], TransformersEngine]) -> TransformersEngine:
    return make_engine(request.param)


@pytest.fixture(scope="module")
def small(make_engine: Callable[[str], TransformersEngine]) -> TransformersEngine:
    return make_engine("float32")


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """10 full chunks and a suffix of 5 tokens."""
    rng = random.Random(3)
    return [rng.randrange(211) for _ in range(10 * CHUNK + 5)]


def cake(engine: TransformersEngine, store: Store | None, codec: str, **options: Any) -> Cake:
    return Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, codec=codec, **options)


def stored(store: Store) -> dict[bytes, bytes]:
    found = {}
    for chunk in store:
        with store.open(chunk.key) as reader:
            data = bytearray(reader.size)
            reader.read_into(memoryview(data), 0)
        found[bytes(chunk.key)] = bytes(data)
    return found


@pytest.mark.parametrize("name", CODECS)
def test_a_prompt_is_restored(engine: TransformersEngine, prompt: list[int], name: str) -> None:
    store = MemoryStore()
    with cake(engine, store, name) as one:
        exact = one.prefill(prompt)
        assert exact.report.exact
        assert exact.report.codec == name
        assert one.wait_saved().error is None
    with cake(engine, store, name) as other:
        restored = other.prefill(prompt, mode="load")
    report, codec = restored.report, codec_named(name)
    assert report.loaded_tokens == 10 * CHUNK
    recent = -(-max(0, codec.window - 5) // CHUNK) * CHUNK
    assert report.lossy_tokens == (10 * CHUNK - recent if codec.lossy else 0)
    assert report.exact == (not codec.lossy)
    assert report.lossy_share == report.lossy_tokens / len(prompt)
    assert report.after_lossy_tokens == (5 if codec.lossy else 0)
    distance = float((restored.logits - exact.logits).abs().max() / exact.logits.abs().max())
    assert distance < {"raw": 1e-6, "int8": 0.05, "two_plane": 0.05, "fp8": 0.2}.get(name, 2.0)
    if not codec.lossy:
        assert torch.equal(restored.logits, exact.logits)


@pytest.mark.parametrize("name", LOSSY)
def test_every_meeting_point(small: TransformersEngine, prompt: list[int], name: str) -> None:
    """Whatever is computed first and loaded behind it: the computed front is exact, the loaded back what was stored."""
    store = MemoryStore()
    with cake(small, store, name) as one:
        full = one.prefill(prompt)
    with cake(small, store, name) as other:
        decoded = other.prefill(prompt, mode="load")
    keys = list(stored(store))
    whole = stored(store)
    for meeting in range(0, 11, 2):
        fewer = MemoryStore()
        with cake(small, fewer, name) as third:
            order = _keys(third, prompt)
            assert set(order) == set(keys)
            for key in order[meeting:]:
                fewer.write(key, memoryview(whole[bytes(key)]))
            mixed = third.prefill(prompt, mode="load")
        assert mixed.report.computed_tokens == meeting * CHUNK + 5
        at = meeting * CHUNK
        for layer, exact, lossy in zip(mixed.cache.stored, full.cache.stored, decoded.cache.stored, strict=True):
            for region, front, back in zip(layer.regions, exact.regions, lossy.regions, strict=True):
                assert torch.equal(region[:, :at], front[:, :at])
                assert torch.equal(region[:, at : 10 * CHUNK], back[:, at : 10 * CHUNK])


def _keys(one: Cake, prompt: list[int]) -> list[Any]:
    return chunk_keys(one.identity, prompt)


class Paced(TransformersEngine):
    """Computes no faster than 2 ms a token, so that slow loads are worth something."""

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        time.sleep(0.002 * len(token_ids))
        return super().compute(cache, token_ids, start, gate)


class Slow(MemoryStore):
    """40 ms before a chunk is open."""

    def open(self, key: ChunkKey) -> ChunkReader:
        time.sleep(0.04)
        return super().open(key)


@pytest.mark.parametrize("name", ["int8", "two_plane", "cachegen"])
def test_layered_finish(
    small: TransformersEngine, prompt: list[int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of coded chunks, read while the suffix is computed, are decoded into their places."""
    monkeypatch.setattr(cutting, "_LEAST_READ_BYTES", 1)
    end = 10 * CHUNK
    long = prompt[:end] + [3, 1, 4, 1, 5, 9, 2, 6] * 20
    store = Slow()
    with cake(small, store, name) as one:
        exact = one.prefill(prompt[: end + 1])
    with cake(small, store, name) as other:
        decoded = other.prefill(prompt[: end + 1], mode="load")
    pieces = 0
    with cake(Paced(small.model), store, name) as third:
        for _ in range(40):  # until one was finished in layers: the first teaches what both arms cost
            mixed = third.prefill(long, mode="both", save=False)
            pieces += sum(load.group is not None for load in mixed.report.loads)
            computed = torch.zeros(len(long), dtype=torch.bool)
            for span in mixed.report.spans:
                computed[span.start : span.start + span.tokens] = True
            assert mixed.report.lossy_tokens == int((~computed[:end]).sum())
            for layer, first, second in zip(mixed.cache.stored, exact.cache.stored, decoded.cache.stored, strict=True):
                for region, front, back in zip(layer.regions, first.regions, second.regions, strict=True):
                    front_end = int(computed[:end].long().argmin()) if not computed[:end].all() else end
                    assert torch.allclose(region[:, :front_end], front[:, :front_end], atol=1e-4)
                    assert torch.equal(region[:, :end][:, ~computed[:end]], back[:, :end][:, ~computed[:end]])
            again = small.compute(mixed.cache, long[end:], end)
            assert torch.allclose(mixed.logits, again, atol=1e-4)
            if pieces:
                break
    assert pieces


def test_what_is_computed_behind_lossy_chunks_is_not_saved(small: TransformersEngine, prompt: list[int]) -> None:
    store = MemoryStore()
    with cake(small, store, "int8") as one:
        one.prefill(prompt)
    before = stored(store)
    longer = [*prompt, *prompt[:100]]
    with cake(small, store, "int8") as other:
        report = other.prefill(longer, mode="load").report
        assert report.lossy_tokens == 10 * CHUNK
        assert report.after_lossy_tokens == len(longer) - 10 * CHUNK
        other.wait_saved()
    assert stored(store) == before
    with cake(small, MemoryStore(), "int8") as third:
        third.prefill(longer)
        assert third.wait_saved().saved_chunks == len(longer) // CHUNK


def test_a_hole_in_front_of_lossy_chunks_is_saved_again_and_behind_them_is_not(
    small: TransformersEngine, prompt: list[int]
) -> None:
    store = MemoryStore()
    with cake(small, store, "int8") as one:
        one.prefill(prompt)
        keys = _keys(one, prompt)
    before = stored(store)
    store.delete([keys[0], keys[5]])
    with cake(small, store, "int8") as other:
        report = other.prefill(prompt, mode="load").report
        assert report.computed_tokens == 2 * CHUNK + 5
        other.wait_saved()
    after = stored(store)
    assert keys[5] not in after
    assert after[keys[0]] == before[keys[0]]


def test_recipes_do_not_share_keys(small: TransformersEngine, prompt: list[int]) -> None:
    recipes = [*CODECS, "kivi:bits=3", "kivi:window=64", "int4:group=16", "int8:window=32"]
    roots = set()
    for recipe in recipes:
        with cake(small, None, recipe) as one:
            roots.add(one.identity.root)
    assert len(roots) == len(recipes)
    assert cake(small, None, "raw").identity == small.identity(CHUNK)
    with cake(small, None, "two_plane:read=upper") as one, cake(small, None, "two_plane") as other:
        assert one.identity == other.identity


def test_the_newest_tokens_are_stored_exactly_and_asked_for_exactly(
    small: TransformersEngine, prompt: list[int]
) -> None:
    store = MemoryStore()
    recipe = f"kivi:bits=2,window={2 * CHUNK}"
    with cake(small, store, recipe) as one:
        one.prefill(prompt)
        keys = _keys(one, prompt)
    data = stored(store)
    sizes = [len(data[key]) for key in keys]
    assert len(set(sizes[:8])) == 1  # tokens 261 to 324 are the newest 64
    assert sizes[8] == sizes[9] > sizes[0]
    shorter = prompt[: 6 * CHUNK + 1]
    with cake(small, store, recipe) as other:
        report = other.prefill(shorter, mode="load").report
        assert report.loaded_tokens == report.lossy_tokens == 4 * CHUNK
        assert report.computed_tokens == 2 * CHUNK + 1


def test_the_upper_plane_alone(small: TransformersEngine, prompt: list[int]) -> None:
    store = MemoryStore()
    with cake(small, store, "two_plane") as one:
        exact = one.prefill(prompt)
    results = {}
    for read in ("both", "upper"):
        with cake(small, store, f"two_plane:read={read}") as other:
            results[read] = other.prefill(prompt, mode="load")
    away = {read: float((one.logits - exact.logits).abs().mean()) for read, one in results.items()}
    assert away["both"] < away["upper"] / 4
    bytes_read = {read: one.report.bytes_by_tier["memory"] for read, one in results.items()}
    assert bytes_read["upper"] < 0.8 * bytes_read["both"]


@pytest.mark.parametrize("name", ["int4", "kivi", "two_plane"])
def test_damage_is_found_and_recomputed(small: TransformersEngine, prompt: list[int], name: str) -> None:
    store = MemoryStore()
    with cake(small, store, name) as one:
        exact = one.prefill(prompt)
        keys = _keys(one, prompt)
    data = bytearray(stored(store)[keys[3]])
    data[5000] ^= 4
    store.write(keys[3], memoryview(data))
    store.delete([key for key in keys if key != keys[3]])
    with cake(small, store, name) as other:
        restored = other.prefill(prompt, mode="load")
    assert restored.report.loaded_tokens == 0
    assert any(reason.startswith("corrupt: segment") for reason in restored.report.miss_reasons())
    assert torch.allclose(restored.logits, exact.logits, atol=1e-4)


def test_keys_that_are_not_finite_are_not_saved(small: TransformersEngine, prompt: list[int]) -> None:
    with cake(small, MemoryStore(), "int8") as one:
        prefill = one.prefill(prompt, save=False)
        prefill.cache.stored[1].regions[0][0, 3, 0] = float("nan")
        saver = one._saver
        assert saver is not None
        saver.save(_keys(one, prompt)[0], 0, lambda views: one.engine.gather(prefill.cache, 0, CHUNK, views))
        saved = one.wait_saved()
    assert saved.failed_chunks == 1
    assert "layer 1" in str(saved.error)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("int5", "int5"),
        ("int4:grp=3", "grp=3"),
        ("int4:group=0", "group is 0"),
        ("kivi:bits=5", "2, 3 or 4"),
        ("kivi:bits=two", "'two'"),
        ("think:drop=1.0", "between 0 and 1"),
        ("think:pairwise=1", "yes or no"),
        ("two_plane:read=lower", "both or upper"),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(small: TransformersEngine, recipe: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        cake(small, None, recipe)
