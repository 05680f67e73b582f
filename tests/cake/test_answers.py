"""Answers are saved as prompts are: whoever goes on from one restores all but the new tokens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.keys import ChunkKey, chained_keys
from cakekv.results import Generation
from cakekv.store.disk import DiskStore
from cakekv.store.faulty import FaultPlan, FaultyStore
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.striped import StripedStore
from cakekv.store.tiered import TieredStore, TierPlan, Writing
from tests.cake.crowd import tokens
from tests.cake.poisoned import Poisoned
from tests.cake.test_asyncio import Letters
from tests.matrix.models import build
from tests.store.chunks import opener

CHUNK = 16
QUESTIONS = [tokens(1, 41), [5, 6, 7], tokens(2, 20), [9], tokens(3, 7)]
"""What is said in each turn of a conversation."""


@pytest.fixture(scope="module")
def engine(engine: TransformersEngine) -> TransformersEngine:
    """Answers as long as they may be."""
    endless = Poisoned(engine.model)
    endless.stop_tokens = frozenset()
    return endless


def cake_of(engine: Any, store: Any, **options: Any) -> Cake:
    return Cake(engine, None, store, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, **options)


def answer(engine: Any, store: Any, prompt: list[int], length: int = 21, **options: Any) -> Generation:
    """By a Cake of its own, as after a restart."""
    with cake_of(engine, store) as cake:
        return cake.generate(prompt, max_new_tokens=length, **{"mode": "load", **options})


def full(engine: Any, prompt: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = cake_of(engine, None).prefill(list(prompt)).logits
    return logits


def held(store: Any) -> set[ChunkKey]:
    return {chunk.key for chunk in store}


def keys_of(engine: Any, history: Sequence[int]) -> list[ChunkKey]:
    """Of its full chunks and its tail."""
    identity = cake_of(engine, "memory://").identity
    return chained_keys(identity.root, CHUNK, list(history), with_tail=True)


def check_exact(engine: Any, store: Any, prompt: list[int], loaded: int) -> None:
    """It is restored to what a full prefill computes, so many tokens of it being loaded."""
    with cake_of(engine, store) as cake:
        prefill = cake.prefill(prompt, mode="load", save=False)
    expected = full(engine, prompt)
    torch.testing.assert_close(prefill.logits, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert prefill.report.exact
    assert prefill.report.loaded_tokens == loaded


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "mistral", "gemma3", "bloom"])
def test_each_turn_restores_all_before_its_question(name: str) -> None:
    engine = Poisoned(build(name))
    engine.stop_tokens = frozenset()
    store, history, known = MemoryStore(), list[int](), 0
    for question in QUESTIONS:
        history += [token % 120 + 3 for token in question]
        check_exact(engine, store, history, known)
        history += answer(engine, store, history, 11).token_ids
        known = len(history)
        assert held(store) == set(keys_of(engine, history)), "of tails that were outgrown, nothing is left"


def stores(name: str, folder: Path) -> Any:
    if name == "striped":
        return StripedStore([DiskStore(folder / end) for end in "ab"])
    if name == "tiered":
        tiers = (MemoryStore(), Writing.THROUGH), (DiskStore(folder), Writing.BACK)
        return TieredStore([TierPlan(Member(opener(store), store.name), write) for store, write in tiers])
    return f"file://{folder}" + ("?pack=yes" if name == "packed" else "")


@pytest.mark.parametrize("name", ["disk", "packed", "tiered", "striped"])
def test_other_stores(engine: Any, name: str, tmp_path: Path) -> None:
    store = stores(name, tmp_path)
    history = [*QUESTIONS[0]]
    for question in QUESTIONS[1:4]:
        history += [*answer(engine, store, history).token_ids, *question]
        check_exact(engine, store, history, len(history) - len(question))


class Dear(MemoryStore):
    """Takes a request for every chunk that is asked for, as object stores do."""

    asked = 0

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        self.asked += len(keys)
        return super().lookup(keys)

    def probe(self, keys: Sequence[ChunkKey]) -> Any:
        return None


def test_dear_stores_are_asked_only_for_tails_that_are_remembered(engine: Any) -> None:
    store, history = Dear(), [*QUESTIONS[0]]
    with cake_of(engine, store) as cake:
        history += cake.generate(history, max_new_tokens=21).token_ids
        cake.wait_saved()
        store.asked = 0
        assert cake.prefill([*history, 1], mode="load", save=False).report.loaded_tokens == len(history)
        assert store.asked == len(history) // CHUNK + 1
    store.asked = 0
    check_exact(engine, store, [*history, 1], len(history) // CHUNK * CHUNK)
    assert store.asked == len(history) // CHUNK


def test_another_answer_to_the_same_prompt(engine: Any) -> None:
    """Neither branch is served what belongs to the other."""
    store, prompt = MemoryStore(), QUESTIONS[0]
    before = [*prompt, *answer(engine, store, prompt).token_ids, *QUESTIONS[1]]
    seeds = {1: 5, 2: 30, 3: 12}
    branches = {
        seed: [*before, *answer(engine, store, before, length, temperature=5.0, seed=seed).token_ids]
        for seed, length in seeds.items()
    }
    assert len({tuple(branch[len(before) :][:5]) for branch in branches.values()}) == 3
    for branch in branches.values():
        check_exact(engine, store, [*branch, 1], len(branch))
    for branch in branches.values():
        history = [*branch, 1, *answer(engine, store, [*branch, 1]).token_ids]
        check_exact(engine, store, [*history, 2], len(history))


def test_an_answer_can_be_gone_on_with(engine: Any) -> None:
    """As one that was too long for `max_new_tokens` is."""
    store, prompt = MemoryStore(), QUESTIONS[0]
    whole = answer(engine, None, prompt, 30).token_ids
    begun = answer(engine, store, prompt, 9).token_ids
    rest = answer(engine, store, [*prompt, *begun], 21)
    assert begun + rest.token_ids == whole
    assert rest.report.loaded_tokens >= len(prompt) + len(begun) - 1
    assert answer(engine, store, [*prompt, *begun], 21).token_ids == rest.token_ids


def test_nothing_of_an_answer_is_saved_where_that_is_not_wanted(engine: Any) -> None:
    store, prompt = MemoryStore(), QUESTIONS[0]
    answer(engine, store, prompt, save=False)
    assert held(store) == set()
    with cake_of(engine, store, save_answers=False) as cake:
        cake.generate(prompt, max_new_tokens=21)
    assert held(store) == set(keys_of(engine, prompt[:32]))
    with cake_of(engine, store) as cake:
        cake.prefill([*prompt, 1, 2])
    assert held(store) == set(keys_of(engine, prompt[:32])), "who asks for no answer has no tail"


def test_an_answer_that_is_broken_off_keeps_the_chunks_that_it_filled(engine: Any) -> None:
    store, prompt = MemoryStore(), QUESTIONS[0]
    expected = answer(engine, None, prompt, 40).token_ids
    with Cake(engine, Letters(), store, chunk_tokens=CHUNK) as cake:
        pieces = cake.stream(prompt, max_new_tokens=40)
        for _ in range(20):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        del pieces
        gc.collect()
    assert held(store) == set(keys_of(engine, [*prompt, *expected][: 3 * CHUNK]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_answer_that_fails(engine: Any, error: type[BaseException]) -> None:
    store, prompt = MemoryStore(), QUESTIONS[0]
    expected = answer(engine, None, prompt, 40).token_ids

    class Failing(Poisoned):
        def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
            logits = super().compute(cache, token_ids, start, gate)
            if start == 70:
                raise error
            return logits

    failing = Failing(engine.model)
    failing.stop_tokens = frozenset()
    with cake_of(failing, store) as cake, pytest.raises(error):
        cake.generate(prompt, max_new_tokens=40)
    assert held(store) == set(keys_of(engine, [*prompt, *expected][: 4 * CHUNK]))
    check_exact(engine, store, [*prompt, *expected], 4 * CHUNK)


def test_a_damaged_tail_is_recomputed_and_replaced(engine: Any) -> None:
    store, prompt = MemoryStore(), QUESTIONS[0]
    history = [*prompt, *answer(engine, store, prompt).token_ids]
    tail = keys_of(engine, history)[-1]
    with store.open(tail) as reader:
        data = memoryview(bytearray(reader.size))
        reader.read_into(data, 0)
    data[len(data) // 2] ^= 4
    store.write(tail, data)
    going_on = [*history, *QUESTIONS[2]]
    expected = answer(engine, None, going_on)
    got = answer(engine, store, going_on)
    assert got.token_ids == expected.token_ids
    assert got.report.recomputed_tokens == len(history) % CHUNK
    assert any(reason.startswith("corrupt") for reason in got.report.miss_reasons())
    assert tail not in held(store)
    check_exact(engine, store, [*going_on, *got.token_ids, 1], len(going_on) + len(got.token_ids))


def test_behind_a_hole_the_tail_is_found_by_whoever_remembers_it(engine: Any) -> None:
    store, prompt = MemoryStore(), QUESTIONS[0]
    with cake_of(engine, store) as cake:
        history = [*prompt, *cake.generate(prompt, max_new_tokens=21).token_ids]
        cake.wait_saved()
        *_, last, _ = keys_of(engine, history)
        store.delete([last])
        prefill = cake.prefill([*history, 1], mode="load")
    assert prefill.report.loaded_tokens == len(history) - CHUNK
    torch.testing.assert_close(prefill.logits, full(engine, [*history, 1]), rtol=0, atol=1e-3)
    assert last in held(store)


def test_with_a_lossy_codec_only_what_is_exact_is_saved(engine: Any) -> None:
    store, history = MemoryStore(), [*QUESTIONS[0]]
    with cake_of(engine, store, codec="int8") as cake:
        history += cake.generate(history, max_new_tokens=21).token_ids
        cake.wait_saved()
        before = held(store)
        assert len(before) == len(history) // CHUNK + 1
        second = cake.generate([*history, *QUESTIONS[2]], max_new_tokens=21, mode="load")
        cake.wait_saved()
    assert second.report.loaded_tokens == len(history)
    assert second.report.lossy_tokens == len(history) // CHUNK * CHUNK, "the tail is exact"
    assert held(store) == before


def test_a_codec_with_a_window_keeps_the_newest_tokens_exact(engine: Any) -> None:
    store, history = MemoryStore(), [*QUESTIONS[0]]
    with cake_of(engine, store, codec="kivi:bits=2,group=16,window=32") as cake:
        history += cake.generate(history, max_new_tokens=21).token_ids
        cake.wait_saved()
        report = cake.prefill([*history, 1], mode="load", save=False).report
    assert report.loaded_tokens == len(history)
    assert report.lossy_tokens <= len(history) + 1 - 32


def test_a_model_that_changes_in_mid_answer(engine: Any) -> None:
    model = build("llama")
    changing, store = TransformersEngine(model), MemoryStore()
    changing.stop_tokens = frozenset()
    prompt = [token % 120 + 3 for token in QUESTIONS[0]]
    with Cake(changing, Letters(), store, chunk_tokens=CHUNK) as cake:
        pieces = cake.stream(prompt, max_new_tokens=40)
        next(pieces)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
        for _ in pieces:
            pass
        assert cake.last_report is not None
        assert any("model changed" in note for note in cake.last_report.notes)
    assert len(held(store)) == len(prompt) // CHUNK


def test_several_go_on_from_one_history_at_once(engine: Any) -> None:
    store, prompt = MemoryStore(), QUESTIONS[0]
    history = [*prompt, *answer(engine, store, prompt).token_ids]
    prompts = [[*history, token, *QUESTIONS[2]] for token in range(6)]
    expected = [answer(engine, None, one).token_ids for one in prompts]
    together = threading.Barrier(len(prompts))
    with cake_of(engine, store) as cake, ThreadPoolExecutor(len(prompts)) as pool:

        def ask(prompt: list[int]) -> list[int]:
            together.wait()
            return cake.generate(prompt, max_new_tokens=21, mode="load").token_ids

        assert list(pool.map(ask, prompts)) == expected
    for one, said in zip(prompts, expected, strict=True):
        check_exact(engine, store, [*one, *said, 1], len(one) + len(said))


def test_a_store_that_fails_now_and_then(engine: Any) -> None:
    odds: Any = {("lookup", "error"): 0.3, ("open", "vanish"): 0.2, ("write", "error"): 0.3, ("write", "corrupt"): 0.2}
    store = FaultyStore(MemoryStore(), FaultPlan(odds, seed=1))
    history = [*QUESTIONS[0]]
    for question in QUESTIONS[1:]:
        expected = answer(engine, None, history).token_ids
        assert answer(engine, store, history).token_ids == expected
        history += [*expected, *question]
