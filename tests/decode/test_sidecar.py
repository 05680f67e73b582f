"""Clusters stored beside the chunks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cakekv import BadInput, Cake
from cakekv.cli.main import app
from cakekv.decode import kmeans as module
from cakekv.decode.clusterkv import clustered
from cakekv.decode.groups import Groups
from cakekv.decode.sidecar import Sidecar, sidecar_key
from cakekv.embedded.saver import SaveReport
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import CorruptChunk
from cakekv.keys import ChunkKey
from cakekv.restore.report import RestoreReport
from cakekv.store.base import ChunkReader
from cakekv.store.faulty import FaultPlan, FaultyStore
from cakekv.store.memory import MemoryStore
from tests.matrix.models import build

CHUNK = 8
RECIPE = "clusterkv:budget=40,sinks=4,tokens=8,span=32,full_layers=1"
PROMPT = random.Random(5).choices(range(3, 128), k=117)
"""3 spans that are stored, in 12 of 14 full chunks."""


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries were put into clusters, each time."""
    from cakekv.decode import clusterkv

    counts: list[int] = []

    def counting(keys: torch.Tensor, clusters: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(keys.shape[1])
        return module.kmeans(keys, clusters, iterations)

    monkeypatch.setattr(clusterkv, "kmeans", counting)
    return counts


def answered(
    engine: TransformersEngine, store: Any, prompt: Sequence[int] = PROMPT, recipe: str = RECIPE
) -> tuple[list[int], RestoreReport, SaveReport]:
    with Cake(engine, None, store, chunk_tokens=CHUNK, decode=recipe) as cake:
        answer = cake.generate(prompt, max_new_tokens=8)
        return answer.token_ids, answer.report, cake.wait_saved()


def groups_of(seed: int, start: int, entries: int) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (2, entries), generator=generator)
    return clustered(labels, torch.randn((2, 4, 8), generator=generator), start)


def same(one: Groups, other: Groups) -> bool:
    pairs = zip((one.order, one.sizes, *one.marks), (other.order, other.sizes, *other.marks), strict=True)
    return one.end == other.end and all(torch.equal(*pair) for pair in pairs)


def test_what_is_read_is_what_was_written() -> None:
    first, later = Sidecar(ChunkKey(bytes(32)), 0, 32), Sidecar(ChunkKey(bytes(31) + b"1"), 32, 64)
    for sidecar, entries in ((first, 28), (later, 32)):
        groups = {layer: groups_of(layer, sidecar.end - entries, entries) for layer in (1, 3)}
        data = sidecar.seal(groups, 5)
        assert len(data) % 4096 == 0
        read = sidecar.read(data, {1: 2, 3: 2})
        assert all(same(groups[layer], read[layer]) for layer in groups)
        with pytest.raises(CorruptChunk):
            sidecar.read(data, {1: 2, 2: 2, 3: 2})
        with pytest.raises(CorruptChunk):
            sidecar.read(data, {1: 3})


def test_it_is_bound_to_key_place_layer_and_every_byte() -> None:
    sidecar = Sidecar(ChunkKey(bytes(32)), 32, 64)
    groups = {layer: groups_of(layer, 32, 32) for layer in range(2)}
    data = sidecar.seal(groups, 2)
    heads = {0: 2, 1: 2}
    for other in (
        Sidecar(ChunkKey(bytes(31) + b"1"), 32, 64),
        Sidecar(sidecar.key, 64, 96),
        Sidecar(sidecar.key, 32, 48),
    ):
        with pytest.raises(CorruptChunk):
            other.read(data, heads)
    size = int.from_bytes(data[104:112], "little")
    for at in (*range(0, 150, 7), *range(4096, 4096 + 2 * size, 13)):
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(CorruptChunk):
            sidecar.read(memoryview(damaged), heads)
    swapped = bytearray(data)
    at = 4096 + -(-size // 64) * 64
    swapped[4096 : 4096 + size], swapped[at : at + size] = data[at : at + size], data[4096 : 4096 + size]
    with pytest.raises(CorruptChunk):
        sidecar.read(memoryview(swapped), heads)
    with pytest.raises(CorruptChunk):
        sidecar.read(data[:-4096], heads)


def test_its_key_follows_from_chunk_and_recipe() -> None:
    keys = {sidecar_key(ChunkKey(bytes([number]) * 32), recipe) for number in range(2) for recipe in ("a", "b")}
    assert len(keys) == 4


def test_a_restored_prompt_has_the_clusters_that_were_stored(engine: TransformersEngine, made: list[int]) -> None:
    store = MemoryStore()
    first, _, saved = answered(engine, store)
    assert made == [28, 32, 32, 21] * 2  # the first of three layers is seen as a whole
    assert saved.failed_chunks == 0
    assert store.stats().chunks == 14 + 3
    made.clear()
    again, report, _ = answered(engine, store)
    assert made == [21] * 2
    assert report.loaded_tokens + report.computed_tokens >= len(PROMPT)
    assert again == first
    made.clear()
    answered(engine, store, [*PROMPT[:70], 5, *PROMPT[71:]])
    assert made == [32, 21] * 2  # what shares a prefix has its clusters


def test_another_recipe_has_clusters_of_its_own(engine: TransformersEngine, made: list[int]) -> None:
    store = MemoryStore()
    answered(engine, store)
    for was, now in (("tokens=8", "tokens=16"), ("sinks=4", "sinks=2"), ("span=32", "span=64")):
        made.clear()
        answered(engine, store, recipe=RECIPE.replace(was, now))
        assert len(made) > 2
    made.clear()
    answered(engine, store, recipe=RECIPE.replace("budget=40", "budget=50"))
    assert made == [21] * 2


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "gone"])
def test_a_damaged_sidecar_is_made_anew(engine: TransformersEngine, made: list[int], damage: str) -> None:
    store = MemoryStore()
    first, _, _ = answered(engine, store)
    keys = _beside(engine)
    chunks = {}
    for key in keys:
        with store.open(key) as reader:
            buffer = memoryview(bytearray(reader.size))
            assert reader.read_into(buffer, 0) == reader.size
            chunks[key] = buffer
    if damage == "flip":
        chunks[keys[1]][5000] ^= 1
        store.write(keys[1], chunks[keys[1]])
    elif damage == "cut":
        store.write(keys[1], chunks[keys[1]][:4096])
    elif damage == "swap":
        store.write(keys[1], chunks[keys[2]])
    else:
        store.delete([keys[1]])
    made.clear()
    again, report, _ = answered(engine, store)
    assert again == first
    assert made == [32, 21] * 2
    assert any("made anew" in note for note in report.notes) == (damage != "gone")
    made.clear()
    answered(engine, store)
    assert made == [21] * 2  # it was written again


def _beside(engine: TransformersEngine) -> list[ChunkKey]:
    from cakekv.decode import sight_named
    from cakekv.keys import chunk_keys

    keys = chunk_keys(engine.identity(CHUNK), PROMPT)
    return [one.key for one in sight_named(RECIPE).beside(keys, CHUNK)]


def test_what_is_not_exact_has_nothing_beside_it(engine: TransformersEngine, made: list[int]) -> None:
    store = MemoryStore()
    options: dict[str, Any] = {"chunk_tokens": CHUNK, "codec": "int8", "decode": RECIPE}
    with Cake(engine, None, store, chunk_tokens=CHUNK, codec="int8") as cake:
        cake.prefill(PROMPT)
        cake.wait_saved()
    with Cake(engine, None, store, **options) as cake:
        assert cake.prefill(PROMPT, mode="load").report.lossy_tokens
        cake.wait_saved()
    made.clear()
    with Cake(engine, None, store, **options) as cake:
        cake.prefill(PROMPT, mode="load")
    assert made == [28, 32, 32, 21] * 2


def test_a_prompt_that_is_not_saved_leaves_no_clusters(engine: TransformersEngine) -> None:
    store = MemoryStore()
    with Cake(engine, None, store, chunk_tokens=CHUNK, decode=RECIPE) as cake:
        cake.prefill(PROMPT, save=False)
        cake.wait_saved()
    assert store.stats().chunks == 0


def test_to_plan_reads_nothing(engine: TransformersEngine) -> None:
    opened: list[ChunkKey] = []

    class Watched(MemoryStore):
        def open(self, key: ChunkKey) -> ChunkReader:
            opened.append(key)
            return super().open(key)

    store = Watched()
    answered(engine, store)
    opened.clear()
    with Cake(engine, None, store, chunk_tokens=CHUNK, decode=RECIPE) as cake:
        assert cake.plan(PROMPT)
        assert not opened
        cake.prefill(PROMPT)
    assert set(_beside(engine)) <= set(opened)


def test_what_is_forgotten_leaves_no_clusters(engine: TransformersEngine) -> None:
    store = MemoryStore()
    with Cake(engine, None, store, chunk_tokens=CHUNK, decode=RECIPE) as cake:
        cake.prefill(PROMPT)
        cake.wait_saved()
        cake._forget(cake._tokenizing.prompt(PROMPT, [], None))
    assert store.stats().chunks == 0


def test_a_store_that_fails_costs_no_answer(engine: TransformersEngine) -> None:
    inner = MemoryStore()
    first, _, _ = answered(engine, inner)
    again, report, _ = answered(
        engine, FaultyStore(inner, FaultPlan({("open", "error"): 0.3, ("read", "corrupt"): 0.3}, seed=4))
    )
    assert again == first
    assert any("made anew" in note for note in report.notes)


def test_a_store_that_packs_keeps_them(engine: TransformersEngine, made: list[int], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store?pack=yes"
    first, _, saved = answered(engine, url)
    assert saved.failed_chunks == 0
    made.clear()
    assert answered(engine, url)[0] == first
    assert made == [21] * 2


def test_a_span_is_made_of_chunks(engine: TransformersEngine) -> None:
    with pytest.raises(BadInput, match="span is 32, but must be a multiple of chunk_tokens, 24"):
        Cake(engine, None, chunk_tokens=24, decode=RECIPE)


def test_stats_tell_clusters_from_chunks(engine: TransformersEngine, tmp_path: Path) -> None:
    common: dict[str, Any] = {"chunk_tokens": CHUNK, "codec": "int8", "save_answers": False}
    with Cake(engine, None, tmp_path / "none", **common) as cake:
        cake.generate(PROMPT, max_new_tokens=2)
    with Cake(engine, None, tmp_path / "some", decode=RECIPE, **common) as cake:
        cake.generate(PROMPT, max_new_tokens=2)
    stats = [
        json.loads(CliRunner().invoke(app, ["store", "stats", str(tmp_path / name), "--json"]).stdout)
        for name in ("none", "some")
    ]
    assert "beside" not in stats[0]
    assert stats[1]["beside"]["chunks"] == len(PROMPT) // 32
    assert stats[1]["beside"]["bytes"] == stats[1]["bytes"] - stats[0]["bytes"] > 0
    assert stats[1]["chunks"] == stats[0]["chunks"] + 3
    shown = CliRunner().invoke(app, ["store", "stats", str(tmp_path / "some")]).stdout
    assert "3 of them" in shown
