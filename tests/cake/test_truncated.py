"""Prompts whose oldest part was dropped: what is left is moved, is never taken for exact, and goes on turn by turn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.chunk import verify_chunk
from cakekv.engine.base import Move
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.keys import chunk_keys
from cakekv.prompt import Document, Truncated
from cakekv.restore.report import RestoreReport
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from tests.cake.crowd import start, tokens
from tests.cake.poisoned import Poisoned
from tests.matrix.models import build
from tests.matrix.restoring import gather

CHUNK = 16
HEAD, STOP = 2 * CHUNK + 3, 8 * CHUNK + 5
"""What is kept at the beginning, and where what is dropped ends; neither at a chunk's edge."""
OLD = tokens(1, 16 * CHUNK + 2)
STORED = 16 * CHUNK
NEW = tokens(2, 4 * CHUNK + 7)
DROPPED = range(HEAD, STOP)
LEFT = OLD[:HEAD] + OLD[STOP:]
PROMPT = Truncated(OLD + NEW, DROPPED)


def make(engine: Any, store: Any, **options: Any) -> Cake:
    return Cake(engine, None, store, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, **options)


def filled(engine: Any, store: Any, conversation: list[int] = OLD, **options: Any) -> Any:
    """The store, with what a conversation left there."""
    with make(engine, store, **options) as cake:
        cake.prefill(conversation)
        assert cake.wait_saved().failed_chunks == 0
    return store


def how(report: RestoreReport) -> list[tuple[int, int, str]]:
    return [(run.start, run.tokens, run.how) for run in report.positions]


def full(engine: Any, prompt: list[int]) -> torch.Tensor:
    with make(engine, None) as cake:
        logits: torch.Tensor = cake.prefill(prompt).logits
    return logits


def by_hand(engine: Any, old: list[int] = OLD, new: list[int] = NEW, turn: bool = True) -> torch.Tensor:
    """Logits of a prompt, truncated without any of what is tested here."""
    whole = TransformersEngine.new_cache(engine, len(old))
    engine.compute(whole, old, 0)
    left, moved = old[:HEAD] + old[STOP:] + new, len(old) // CHUNK * CHUNK - STOP
    cache = TransformersEngine.new_cache(engine, len(left))
    engine.compute(cache, left[:HEAD], 0)
    move = Move(moved, 0, HEAD - STOP, engine.turnable() if turn else None)
    engine.place_moved(cache, HEAD, moved, gather(engine, whole, STOP, moved), move)
    logits: torch.Tensor = engine.compute(cache, left[HEAD + moved :], HEAD + moved)
    return logits


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi", "bloom"])
def test_the_result_is_that_of_moving_by_hand(name: str) -> None:
    engine = Poisoned(build(name))
    old, new = ([token % 120 + 3 for token in part] for part in (OLD[: -4 * CHUNK], NEW))
    expected = by_hand(engine, old, new)
    with make(engine, filled(engine, MemoryStore(), old)) as cake:
        prefill = cake.prefill(Truncated(old + new, DROPPED), mode="load")
    assert prefill.report.moved_tokens == STORED - 4 * CHUNK - STOP
    assert torch.allclose(prefill.logits, expected, atol=2e-4 * float(expected.abs().max()))


def test_the_report_says_what_was_dropped_and_what_was_moved(engine: Any) -> None:
    with make(engine, filled(engine, MemoryStore())) as cake:
        runs = cake.plan(PROMPT, mode="load")
        prefill = cake.prefill(PROMPT, mode="load")
    report, moved = prefill.report, STORED - STOP
    assert prefill.token_ids == LEFT + NEW
    assert how(report) == [
        (0, HEAD, "exact"),
        (HEAD, moved, "moved"),
        (HEAD + moved, len(LEFT + NEW) - HEAD - moved, "recomputed"),
    ]
    assert (report.exact, report.dropped_tokens, report.moved_tokens) == (False, STOP - HEAD, moved)
    assert report.lossy_tokens == moved
    assert report.loaded_tokens == 2 * CHUNK + moved
    assert any(f"positions {HEAD} to {STOP - 1};" in note for note in report.notes)
    assert sum(run.tokens for run in runs if run.how != "compute") == report.loaded_tokens


def test_keys_that_are_not_turned_give_another_answer(engine: Any) -> None:
    store = filled(engine, MemoryStore())
    with make(engine, store) as cake:
        turned = cake.prefill(PROMPT, mode="load").logits
        coupled = cake.prefill(Truncated(OLD + NEW, DROPPED, turn=False), mode="load")
    assert torch.allclose(turned, by_hand(engine), atol=1e-3)
    assert torch.allclose(coupled.logits, by_hand(engine, turn=False), atol=1e-3)
    assert not torch.allclose(coupled.logits, turned, atol=1e-2)
    assert coupled.report.moved_tokens == STORED - STOP, "what is behind turned keys never serves others"


def test_the_next_turns_restore_what_is_behind_the_cut(engine: Any, tmp_path: Path) -> None:
    """Also in another process; and a cut of what was cut before."""
    with DiskStore(tmp_path) as store:
        filled(engine, store)
        with make(engine, store) as cake:
            cake.prefill(PROMPT, mode="load")
    more = tokens(3, 9)
    with DiskStore(tmp_path) as store, make(engine, store) as cake:
        report = cake.prefill(Truncated(OLD + NEW + more, DROPPED), mode="load").report
        saved = len(LEFT + NEW) // CHUNK * CHUNK
        moved = STORED - STOP
        assert how(report)[1:] == [
            (HEAD, moved, "moved"),
            (HEAD + moved, saved - HEAD - moved, "reused"),
            (saved, len(LEFT + NEW + more) - saved, "recomputed"),
        ]
        cake.wait_saved()
        again = range(HEAD, HEAD + 5 * CHUNK)
        twice = Truncated(Truncated(OLD + NEW + more * 9, DROPPED), again)
        prefill = cake.prefill(twice, mode="load")
        assert prefill.token_ids == (LEFT + NEW + more * 9)[:HEAD] + (LEFT + NEW + more * 9)[again.stop :]
        first = prefill.report
        assert first.moved_tokens == len(LEFT + NEW + more) // CHUNK * CHUNK - again.stop
        assert first.dropped_tokens == len(DROPPED) + len(again)
        assert any(f"positions {HEAD} to {STOP + len(again) - 1};" in note for note in first.notes)
        cake.wait_saved()
        assert cake.prefill(Truncated(twice.content, again), mode="load").report.reused_tokens > 3 * CHUNK


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "mistral", "gemma3", "phi", "bloom"])
def test_what_is_restored_behind_the_cut_is_what_was_computed_there(name: str) -> None:
    engine = Poisoned(build(name))
    engine.stop_tokens = frozenset()
    old, new, more = ([token % 120 + 3 for token in part] for part in (OLD[: -4 * CHUNK], NEW[:30], tokens(4, 20)))
    results = []
    for saves in (True, False):
        with make(engine, filled(engine, MemoryStore(), old)) as cake:
            answer = cake.generate(Truncated(old + new, DROPPED), mode="load", max_new_tokens=20, save=saves).token_ids
            cake.wait_saved()
            results.append(cake.prefill(Truncated([*old, *new, *answer, *more], DROPPED), mode="load", save=False))
    restored, computed = results
    assert restored.report.reused_tokens > 30
    assert computed.report.reused_tokens == 0
    expected = computed.logits
    assert torch.allclose(restored.logits, expected, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("restarts", [False, True])
def test_the_next_turn_restores_all_but_its_own_tokens(engine: Any, restarts: bool) -> None:
    """Of an answer before the cut, of one behind it, and of what came between: tails, too."""
    store, turns = MemoryStore(), [tokens(number, 4 * CHUNK + number) for number in range(10, 16)]
    conversation, drops, lost = list[int](), list[range](), []
    cake = make(engine, store)
    for number, turn in enumerate(turns):
        conversation += turn
        if number in (2, 4):
            drops.append(range(HEAD, HEAD + 3 * CHUNK + 5))
        prompt: Any = conversation
        for dropped in drops:
            prompt = Truncated(prompt, dropped)
        answer = cake.generate(prompt, max_new_tokens=5, mode="load")
        report = answer.report
        lost.append(report.prompt_tokens - len(turn) - report.loaded_tokens)
        conversation += answer.token_ids
        cake.wait_saved()
        if restarts:
            cake.close()
            cake = make(engine, store)
    cake.close()
    assert lost == [0, 0, *[HEAD % CHUNK] * 4], "the chunk in which the gap begins is computed anew"
    assert report.moved_tokens > CHUNK
    assert report.reused_tokens > CHUNK
    sizes = [chunk.size for chunk in store]
    assert sum(size < max(sizes) for size in sizes) <= 3, "of what grew between two cuts, only the last tail is kept"


def test_what_was_truncated_never_serves_an_exact_prompt(engine: Any) -> None:
    store = filled(engine, MemoryStore())
    before = {chunk.key for chunk in store}
    with make(engine, store) as cake:
        cake.prefill(PROMPT, mode="load")
        assert cake.wait_saved().saved_chunks > 3
    assert len({chunk.key for chunk in store} - before) > 3
    for plain in (LEFT + NEW, OLD + NEW):
        with make(engine, store) as cake:
            prefill = cake.prefill(plain, mode="load", save=False)
        assert prefill.report.exact
        assert torch.allclose(prefill.logits, full(engine, plain), atol=1e-4)
    others = [
        Truncated([*OLD[:HEAD], 7, *OLD[HEAD + 1 :], *NEW], DROPPED),  # something else was dropped
        Truncated(OLD + NEW, range(HEAD, STOP), turn=False),
        Truncated(Truncated(OLD + NEW, range(HEAD, STOP - 9)), range(HEAD, HEAD + 9)),
    ]
    for other in others:
        with make(engine, store) as cake:
            assert cake.prefill(other, mode="load", save=False).report.reused_tokens == 0
    for options in ({"tenant": "other"}, {"codec": "int8"}):
        with make(engine, store, **options) as cake:
            assert cake.prefill(PROMPT, mode="load", save=False).report.loaded_tokens == 0


def test_what_is_computed_before_anything_moved_is_exact_and_stays_so(engine: Any) -> None:
    """Of a truncated prompt of which nothing is stored, everything is."""
    store = MemoryStore()
    with make(engine, store) as cake:
        prefill = cake.prefill(PROMPT)
        assert (prefill.report.exact, prefill.report.positions) == (True, [])
        assert torch.allclose(prefill.logits, full(engine, LEFT + NEW), atol=1e-4)
        cake.wait_saved()
        assert cake.prefill(LEFT + NEW + [5], mode="load").report.loaded_tokens == len(LEFT + NEW) // CHUNK * CHUNK
        filled(engine, store)
        again = cake.prefill(PROMPT, mode="load").report
    assert (again.exact, again.moved_tokens) == (True, 0)


def test_a_damaged_chunk_is_computed(engine: Any, tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        filled(engine, store)
        with make(engine, store) as cake:
            name = chunk_keys(cake.identity, OLD)[10].hex()
        (file,) = store.path.glob(f"chunks/*/{name[2:]}.chunk")
        damaged = bytearray(file.read_bytes())
        damaged[-3000] ^= 1
        file.write_bytes(damaged)
        with make(engine, store) as cake:
            report = cake.prefill(PROMPT, mode="load").report
        assert report.moved_tokens == STORED - STOP - CHUNK
        assert report.recomputed_tokens == CHUNK
        assert any(reason.startswith("corrupt") for reason in report.miss_reasons())


def test_an_interrupt_leaves_nothing_half(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = TransformersEngine.compute

    def interrupted(self: Any, cache: Any, token_ids: Any, start: int, gate: Any = None) -> Any:
        if start > len(LEFT) + CHUNK:
            raise KeyboardInterrupt
        return compute(self, cache, token_ids, start, gate)

    with DiskStore(tmp_path) as store:
        filled(engine, store)
        with make(engine, store) as cake, monkeypatch.context() as patch:
            patch.setattr(TransformersEngine, "compute", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cake.prefill(PROMPT, mode="load")
            assert cake.wait_saved().saved_chunks > 0
        for file in store.path.glob("chunks/*/*.chunk"):
            verify_chunk(memoryview(file.read_bytes()))
        with make(engine, store) as cake:
            prefill = cake.prefill(PROMPT, mode="load")
        assert prefill.report.reused_tokens > 0, "what was saved before the interrupt serves"
        assert torch.allclose(prefill.logits, by_hand(engine), atol=1e-3)


@pytest.mark.parametrize("codec", ["int8:window=32", "kivi:window=32", "cachegen", "ladder:window=0"])
def test_codecs(engine: Any, codec: str) -> None:
    """What was encoded is moved as what was not; and what has seen roundings is not saved."""
    stored, exact = filled(engine, MemoryStore(), codec=codec), filled(engine, MemoryStore())
    with make(engine, stored, codec=codec) as cake, make(engine, exact) as raw:
        prefill, expected = cake.prefill(PROMPT, mode="load"), raw.prefill(PROMPT, mode="load")
        assert cake.wait_saved().saved_chunks == 0
    assert prefill.report.moved_tokens == STORED - STOP
    pairs = zip(prefill.dynamic_cache().layers, expected.dynamic_cache().layers, strict=True)
    here = slice(HEAD, HEAD + STORED - STOP)
    errors = [
        (ours.keys[:, :, here] - theirs.keys[:, :, here]).norm() / theirs.keys[:, :, here].norm()
        for ours, theirs in pairs
    ]
    assert 0 < max(errors) < 0.4


def test_tiers_and_several_at_once(engine: Any) -> None:
    other = Truncated(OLD + NEW[:20], range(CHUNK, 5 * CHUNK))
    stores = [filled(engine, MemoryStore()), MemoryStore()]
    for number, chunk in enumerate(list(stores[0])):
        if number % 2:
            with stores[0].open(chunk.key) as reader:
                data = bytearray(reader.size)
                reader.read_into(memoryview(data), 0)
            stores[1].write(chunk.key, memoryview(data))
            stores[0].delete([chunk.key])
    with make(engine, stores) as cake:
        alone = [cake.prefill(prompt, mode="load", save=False) for prompt in (PROMPT, other)]
        assert all(alone[0].report.bytes_by_tier.values())
        calls = [
            start(str(number), partial(cake.prefill, (PROMPT, other)[number % 2], mode="load", save=False))
            for number in range(6)
        ]
        for number, call in enumerate(calls):
            assert torch.allclose(call.result().logits, alone[number % 2].logits, atol=1e-4)


def test_a_model_that_cannot_turn_its_keys_computes_what_is_left() -> None:
    engine = TransformersEngine(build("gpt2"))
    old, new = ([token % 120 + 3 for token in part] for part in (OLD[: 6 * CHUNK], NEW[:20]))
    prompt = Truncated(old + new, range(CHUNK, 3 * CHUNK))
    with make(engine, filled(engine, MemoryStore(), old)) as cake:
        report = cake.prefill(prompt, mode="load").report
        cake.wait_saved()
        again = cake.prefill(prompt, mode="load").report
    assert (report.exact, report.loaded_tokens, report.dropped_tokens) == (True, CHUNK, 2 * CHUNK)
    assert any("RoPE" in note for note in report.notes), report.notes
    assert again.exact
    assert again.loaded_tokens == len(prompt.content) // CHUNK * CHUNK - 2 * CHUNK  # type: ignore[arg-type]


def test_longer_than_the_context_before_it_was_truncated(engine: Any) -> None:
    context = engine.max_context
    with make(engine, MemoryStore()) as cake:
        old = tokens(5, context - 4)
        cake.prefill(old)
        cake.wait_saved()
        conversation = old + tokens(6, 60)
        with pytest.raises(BadInput, match="context"):
            cake.generate(conversation)
        answer = cake.generate(Truncated(conversation, range(64, context // 2)), max_new_tokens=4, mode="load")
    assert answer.report.moved_tokens > context // 2 - 2 * CHUNK
    assert len(answer.token_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Truncated(OLD, range(0, len(OLD))), "empty"),
        (Truncated(OLD, range(0, len(OLD) + 1)), "dropped"),
        (Truncated(OLD, range(5, 2)), "dropped"),
        (Truncated(OLD, range(0, 20, 2)), "dropped"),
        (Truncated(OLD, 5), "dropped"),  # type: ignore[arg-type]
        (Truncated([Document(OLD), [5]], range(2)), "documents"),  # type: ignore[list-item]
        (Truncated("text", range(2)), "no tokenizer"),
        (Truncated([-1, *OLD], range(2)), "token"),
        (Truncated(Truncated(OLD, range(9)), range(len(OLD))), "dropped"),
    ],
)
def test_what_cannot_be_truncated_is_refused(engine: Any, prompt: Truncated, message: str) -> None:
    with make(engine, MemoryStore()) as cake, pytest.raises(BadInput, match=message):
        cake.prefill(prompt)


def test_nothing_dropped_is_a_prompt_like_any_other(engine: Any) -> None:
    with make(engine, filled(engine, MemoryStore())) as cake:
        report = cake.prefill(Truncated(OLD, range(3, 3)), mode="load").report
    assert (report.exact, report.loaded_tokens, report.notes) == (True, STORED, [])
