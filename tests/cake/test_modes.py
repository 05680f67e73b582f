"""One prompt, every mode and many stores: the same answer, and proof that loading really happened."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.keys import chunk_keys
from cakekv.restore.planner import MODES
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from tests.cake.poisoned import Poisoned
from tests.matrix.models import build
from tests.matrix.restoring import prompt as windowed_prompt

CHUNK = 16


def filled(engine: TransformersEngine, prompt: list[int]) -> MemoryStore:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=64) as cake:
        cake.prefill(prompt, mode="compute")
        assert cake.wait_saved().failed_chunks == 0
    return store


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_answer_of_a_full_prefill(
    engine: TransformersEngine, prompt: list[int], mode: Any
) -> None:
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=12)
    store = filled(engine, prompt)
    with Cake(Poisoned(engine.model), store=store, chunk_tokens=CHUNK, max_span_tokens=64) as cake:
        answer = cake.generate(prompt, max_new_tokens=12, mode=mode)
    report = answer.report
    assert answer.token_ids == expected.token_ids
    assert report.computed_tokens + report.loaded_tokens == len(prompt)
    assert report.recomputed_tokens == 0
    if mode == "compute":
        assert report.loaded_tokens == 0
        assert report.bytes_by_tier == {"memory": 0}
    if mode == "load":
        assert report.loaded_tokens == 20 * CHUNK
        assert report.computed_tokens == 5
    if mode == "both":
        assert report.loaded_tokens > 0
        assert report.computed_tokens > 5
        assert report.met_at is not None


def test_what_is_placed_is_what_is_used(
    engine: TransformersEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: throwing away what was loaded must show."""
    store = filled(engine, prompt)
    loaded = Cake(engine, store=store, chunk_tokens=CHUNK).prefill(prompt, mode="load").logits
    monkeypatch.setattr(TransformersEngine, "place", lambda *_: 0)
    dropped = Cake(Poisoned(engine.model), store=store, chunk_tokens=CHUNK).prefill(prompt, mode="load").logits
    assert not loaded.isnan().any()
    assert dropped.isnan().all()


def test_a_chunk_is_copied_once_between_its_read_and_the_cache(engine: TransformersEngine, prompt: list[int]) -> None:
    store = filled(engine, prompt)
    report = Cake(engine, store=store, chunk_tokens=CHUNK).prefill(prompt, mode="load").report
    assert report.placed_bytes == 20 * CHUNK * engine.layout.token_bytes
    assert report.bytes_by_tier["memory"] == sum(chunk.size for chunk in store)


@pytest.mark.parametrize("seed", range(6))
def test_holes_anywhere_are_computed_and_what_is_stored_around_them_is_used(
    engine: TransformersEngine, prompt: list[int], seed: int
) -> None:
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=8)
    store = filled(engine, prompt)
    keys = {chunk.key for chunk in store}
    gone = random.Random(seed).sample(sorted(keys), 7)
    store.delete(gone)
    with Cake(Poisoned(engine.model), store=store, chunk_tokens=CHUNK) as cake:
        answer = cake.generate(prompt, max_new_tokens=8, mode="load")
        assert answer.token_ids == expected.token_ids
        assert answer.report.loaded_tokens == 13 * CHUNK
        assert cake.wait_saved().saved_chunks == 8, "and the answer"
    assert {chunk.key for chunk in store} > keys, "the holes are filled for the next time"


def test_a_shared_prefix_is_found_by_another_prompt(engine: TransformersEngine, prompt: list[int]) -> None:
    store = filled(engine, prompt)
    other = prompt[: 8 * CHUNK + 3] + [1, 2, 3] * 20
    expected = Cake(engine, chunk_tokens=CHUNK).generate(other, max_new_tokens=8)
    answer = Cake(engine, store=store, chunk_tokens=CHUNK).generate(other, max_new_tokens=8, mode="load")
    assert answer.token_ids == expected.token_ids
    assert answer.report.prefix_tokens == 8 * CHUNK


@pytest.mark.parametrize(("more", "loaded"), [(-1, 9 * CHUNK), (0, 10 * CHUNK - 1), (1, 10 * CHUNK)])
def test_where_a_chunk_ends_all_is_loaded_but_the_last_token(
    engine: TransformersEngine, prompt: list[int], more: int, loaded: int
) -> None:
    ids = prompt[: 10 * CHUNK + more]
    store = filled(engine, prompt)
    expected = Cake(engine, chunk_tokens=CHUNK).generate(ids, max_new_tokens=12)
    options: Any = {"max_span_tokens": 64, "save_answers": False}
    with Cake(Poisoned(engine.model), store=store, chunk_tokens=CHUNK, **options) as cake:
        for mode in MODES:
            answer = cake.generate(ids, max_new_tokens=12, mode=mode)
            assert answer.token_ids == expected.token_ids
            assert answer.report.computed_tokens + answer.report.loaded_tokens == len(ids)
            assert answer.report.prefix_tokens == loaded
            assert answer.report.loaded_tokens == loaded or mode != "load"
        assert cake.wait_saved().saved_chunks == 0


def test_a_last_chunk_that_cannot_be_had_is_computed_in_one_span_and_saved_once(
    engine: TransformersEngine, prompt: list[int]
) -> None:
    ids = prompt[: 10 * CHUNK]
    store = filled(engine, ids)
    expected = Cake(engine, chunk_tokens=CHUNK).generate(ids, max_new_tokens=4)
    key = chunk_keys(Cake(engine, chunk_tokens=CHUNK).identity, ids)[9]
    with store.open(key) as reader:
        data = bytearray(reader.size)
        reader.read_into(memoryview(data), 0)
    data[-1] ^= 1
    store.write(key, memoryview(data))
    with Cake(Poisoned(engine.model), store=store, chunk_tokens=CHUNK) as cake:
        report = cake.prefill(ids, mode="load").report
        assert (report.loaded_tokens, report.recomputed_tokens) == (9 * CHUNK, CHUNK - 1)
        assert [(span.start, span.tokens) for span in report.spans] == [(9 * CHUNK, CHUNK)]
        assert cake.wait_saved().saved_chunks == 1
        answer = cake.generate(ids, max_new_tokens=4, mode="load")
        assert answer.token_ids == expected.token_ids
        assert answer.report.computed_tokens == 1


@pytest.mark.parametrize(("codec", "lossy"), [("int8", 10 * CHUNK - 1), (f"kivi:bits=4,window={2 * CHUNK}", 8 * CHUNK)])
def test_lossy_tokens_are_counted_without_the_last_one(
    engine: TransformersEngine, prompt: list[int], codec: str, lossy: int
) -> None:
    """The newest tokens that a codec's window keeps exact are loaded so; and nothing is saved twice."""
    ids, store = prompt[: 10 * CHUNK], MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec=codec) as cake:
        cake.prefill(ids)
        assert cake.wait_saved().saved_chunks == 10
        report = cake.prefill(ids, mode="load").report
        assert (report.computed_tokens, report.lossy_tokens, report.after_lossy_tokens) == (1, lossy, 1)
        assert sum(report.level_tokens.values()) == 10 * CHUNK - 1
        assert cake.wait_saved().saved_chunks == 10


@pytest.mark.parametrize("name", ["gemma3", "mistral", "llama4"])
def test_windows_reach_back_from_the_last_token(name: str) -> None:
    torch.manual_seed(0)
    engine, ids = TransformersEngine(build(name)), windowed_prompt()[:72]
    expected = Cake(engine, chunk_tokens=8).generate(ids, max_new_tokens=8)
    with Cake(Poisoned(engine.model), store=MemoryStore(), chunk_tokens=8, max_span_tokens=16) as cake:
        cake.prefill(ids)
        cake.wait_saved()
        for mode in MODES:
            answer = cake.generate(ids, max_new_tokens=8, mode=mode)
            assert answer.token_ids == expected.token_ids
            assert answer.report.computed_tokens == 1 or mode != "load"


def test_chunks_survive_a_restart(engine: TransformersEngine, prompt: list[int], tmp_path: Path) -> None:
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=8)
    with DiskStore(tmp_path / "kv") as store, Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
    with Cake(engine, store=f"file://{tmp_path}/kv", chunk_tokens=CHUNK) as cake:
        answer = cake.generate(prompt, max_new_tokens=8, mode="load")
    assert answer.report.loaded_tokens == 20 * CHUNK
    assert answer.token_ids == expected.token_ids


def test_two_tiers_share_the_load(engine: TransformersEngine, prompt: list[int]) -> None:
    first, second = filled(engine, prompt), filled(engine, prompt)
    second.name = "other"
    keys = sorted(chunk.key for chunk in first)
    first.delete(keys[::2])
    second.delete(keys[1::2])
    report = Cake(engine, store=[first, second], chunk_tokens=CHUNK).prefill(prompt, mode="load").report
    assert report.loaded_tokens == 20 * CHUNK
    assert set(report.bytes_by_tier) == {"memory", "other"}
    assert all(report.bytes_by_tier.values())


def test_tenants_never_share(engine: TransformersEngine, prompt: list[int]) -> None:
    store = filled(engine, prompt)
    prefill = Cake(engine, store=store, chunk_tokens=CHUNK, tenant="someone else").prefill(prompt, save=False)
    assert prefill.report.loaded_tokens == 0
    assert any("differs in: tenant" in note for note in prefill.report.notes)


def test_sampling_is_repeatable_and_streaming_tells_the_same(engine: TransformersEngine, prompt: list[int]) -> None:
    class Letters:
        """A tokenizer whose text shows the ids."""

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(0x4E00 + token) for token in tokens)

    cake = Cake(engine, Letters(), filled(engine, prompt), chunk_tokens=CHUNK)
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 5}
    once = cake.generate(prompt, **settings)
    assert once.token_ids == cake.generate(prompt, **settings).token_ids
    assert "".join(cake.stream(prompt, **settings)) == once.text
    assert cake.last_report is not None


@pytest.mark.parametrize("mode", ["compute", "both"])
def test_a_cache_is_gone_with_its_last_user(engine: TransformersEngine, prompt: list[int], mode: Any) -> None:
    with Cake(engine, store=MemoryStore(), chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        gc.collect()
        gc.disable()
        try:
            prefill = cake.prefill(prompt, mode=mode)
            cake.wait_saved()
            cache = weakref.ref(prefill.cache)
            del prefill
            assert cache() is None
        finally:
            gc.enable()


def test_progress_reaches_every_position(engine: TransformersEngine, prompt: list[int]) -> None:
    seen: list[Any] = []
    cake = Cake(engine, store=filled(engine, prompt), chunk_tokens=CHUNK)
    cake.prefill(prompt, mode="both", on_progress=seen.append)
    assert seen[-1].bands[0][0] == 0
    assert seen[-1].bands[-1][1] == len(prompt)
    assert {state for *_, state in seen[-1].bands} == {"loaded", "computed"}
    assert all(a[1] == b[0] for progress in seen for a, b in zip(progress.bands, progress.bands[1:], strict=False))
