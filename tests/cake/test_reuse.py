"""Prompts whose documents were computed elsewhere: what is reused, what is computed, and what is never mixed up."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.engine.base import Move
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.prompt import Document
from cakekv.restore.report import RestoreReport
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from tests.cake.crowd import start, tokens
from tests.cake.poisoned import Poisoned
from tests.cake.test_forks import in_child
from tests.matrix.models import build
from tests.matrix.restoring import gather

CHUNK = 16
SYSTEM, QUESTION, LINK = [5, 6, 7, 8, 9], [11, 12, 13], 4
SHORT, LONG = tokens(1, 3), tokens(2, 5 * CHUNK + 7)
"""A document that is shorter than the link, and one with a tail."""
OTHER = tokens(3, 3 * CHUNK)


def make(engine: Any, store: Any, reuse: Any = f"epic:link={LINK}", **options: Any) -> Cake:
    return Cake(engine, None, store, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, reuse=reuse, **options)


def learned(engine: Any, store: Any, *documents: Sequence[int], **options: Any) -> None:
    with make(engine, store, **options) as cake:
        for document in documents:
            cake.learn(Document(document))


def flat(parts: Any) -> list[int]:
    return [int(token) for part in parts for token in (part.content if isinstance(part, Document) else part)]


def full(engine: Any, prompt: list[int]) -> torch.Tensor:
    with Cake(engine, chunk_tokens=CHUNK) as cake:
        logits: torch.Tensor = cake.prefill(prompt).logits
    return logits


def how(report: RestoreReport) -> list[tuple[int, int, str]]:
    return [(run.start, run.tokens, run.how) for run in report.positions]


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-mixed", "mistral", "gemma3", "gemma3n", "phi", "gpt-neox", "bloom", "cohere", "llama4"]
)
@pytest.mark.parametrize("link", [0, LINK])
def test_the_result_is_that_of_linking_by_hand(name: str, link: int) -> None:
    engine = Poisoned(build(name))
    one, other = ([token % 120 + 3 for token in document] for document in (LONG, OTHER))
    parts: Any = [SYSTEM, Document(one), Document(other), QUESTION]
    prompt = flat(parts)
    by_hand = TransformersEngine.new_cache(engine, len(prompt))
    engine.compute(by_hand, SYSTEM, 0)
    rotations = engine.turnable()
    start = len(SYSTEM)
    for document in (one, other):
        alone = TransformersEngine.new_cache(engine, len(document))
        engine.compute(alone, document, 0)
        if link:
            engine.compute(by_hand, document[:link], start)
        move = Move(len(document), link, start, rotations)
        segments = gather(engine, alone, 0, len(document))
        engine.place_moved(by_hand, start + link, len(document) - link, segments, move)
        start += len(document)
    expected = engine.compute(by_hand, QUESTION, start)
    store = MemoryStore()
    learned(engine, store, one, other)
    with make(engine, store, f"epic:link={link}") as cake:
        prefill = cake.prefill(parts, mode="load")
    report = prefill.report
    assert torch.allclose(prefill.logits, expected, atol=2e-4 * float(expected.abs().max()))
    assert report.loaded_tokens == report.reused_tokens == len(one) + len(other) - 2 * link
    assert not report.exact
    if name != "mistral":  # whose windows do not reach beyond the last document
        assert not torch.allclose(prefill.logits, full(engine, prompt), atol=1e-3), "nothing was reused"


@pytest.fixture
def store(engine: Any) -> MemoryStore:
    """Has all three documents."""
    store = MemoryStore()
    learned(engine, store, SHORT, LONG, OTHER)
    return store


def test_the_report_says_which_positions_are_what(engine: Any, store: Any) -> None:
    parts: Any = [SYSTEM, Document(LONG), Document([]), Document(SHORT), Document(LONG), QUESTION]
    with make(engine, store) as cake:
        report = cake.prefill(parts, mode="load").report
        assert cake.plan(parts, mode="load")[-1].how == "compute"
    first, second = len(SYSTEM), len(SYSTEM) + len(LONG) + len(SHORT)
    end = second + len(LONG)
    assert how(report) == [
        (0, first + LINK, "exact"),
        (first + LINK, len(LONG) - LINK, "reused"),
        (first + len(LONG), len(SHORT) + LINK, "recomputed"),
        (second + LINK, len(LONG) - LINK, "reused"),
        (end, len(QUESTION), "recomputed"),
    ]
    assert (report.reuse, report.linked_tokens) == (f"epic:link={LINK}", 2 * LINK + len(SHORT))
    assert report.miss_reasons()["linked"] == report.linked_tokens
    assert report.lossy_tokens == report.reused_tokens == 2 * (len(LONG) - LINK)
    assert report.after_lossy_tokens == len(SHORT) + LINK + len(QUESTION)
    assert report.computed_tokens + report.loaded_tokens == len(flat(parts))
    assert json.loads(report.to_json())["positions"][0] == {"start": 0, "tokens": first + LINK, "how": "exact"}


def test_a_link_as_long_as_the_documents_is_a_full_prefill(engine: Any, store: Any) -> None:
    parts: Any = [SYSTEM, Document(LONG), Document(OTHER), QUESTION]
    with make(engine, store, "epic:link=1000") as cake:
        prefill = cake.prefill(parts)
    assert torch.allclose(prefill.logits, full(engine, flat(parts)), atol=1e-4)
    assert prefill.report.exact
    assert not prefill.report.positions


def test_a_document_at_the_very_beginning_is_exact_without_a_link(engine: Any, store: Any) -> None:
    with make(engine, store) as cake:
        prefill = cake.prefill([Document(LONG), QUESTION], mode="load")
        assert prefill.report.loaded_tokens == len(LONG)
        assert prefill.report.exact
        assert torch.allclose(prefill.logits, full(engine, LONG + QUESTION), atol=1e-4)
        cake.wait_saved()
        behind = cake.prefill([Document(LONG), Document(OTHER), QUESTION], mode="load").report
    assert how(behind)[0] == (0, len(LONG) + LINK, "exact")


def test_documents_that_nobody_knows_are_computed_exactly_and_learned(engine: Any) -> None:
    parts: Any = [SYSTEM, Document(LONG), QUESTION]
    for learn, loaded in ((False, 0), (True, len(LONG) - LINK)):
        store = MemoryStore()
        with make(engine, store, learn=learn) as cake:
            first = cake.prefill(parts)
            assert first.report.exact
            assert torch.allclose(first.logits, full(engine, flat(parts)), atol=1e-4)
            assert cake.wait_saved().failed_chunks == 0
            assert cake.last_report is first.report, "what goes on in the background is not told"
            elsewhere = [QUESTION, Document(LONG), SYSTEM]
            assert cake.prefill(elsewhere, mode="load").report.reused_tokens == loaded


def test_the_stored_prefix_wins(engine: Any, store: Any) -> None:
    parts: Any = [SYSTEM, Document(LONG), QUESTION]
    with make(engine, store, None) as cake:
        cake.prefill(parts)
    with make(engine, store) as cake:
        same = cake.prefill(parts, mode="load").report
        other = cake.prefill([SYSTEM, Document(LONG), Document(OTHER), QUESTION], mode="load").report
    stored = len(flat(parts)) // CHUNK * CHUNK
    assert how(same)[:2] == [(0, stored, "exact"), (stored, len(SYSTEM) + len(LONG) - stored, "reused")]
    assert how(other)[:2] == how(same)[:2]


def test_nothing_behind_what_was_reused_is_saved(engine: Any, store: Any) -> None:
    before = store.stats().chunks
    parts: Any = [SYSTEM * 7, Document(LONG), Document(OTHER), QUESTION * 20]
    with make(engine, store) as cake:
        cake.prefill(parts, mode="load")
        saved = cake.wait_saved().saved_chunks
    assert saved == (len(SYSTEM * 7) + LINK) // CHUNK == store.stats().chunks - before
    with make(engine, store, None) as cake:
        exact = cake.prefill(flat(parts), mode="load")
    assert exact.report.loaded_tokens == saved * CHUNK
    assert torch.allclose(exact.logits, full(engine, flat(parts)), atol=1e-4)


def test_a_plain_prompt_never_gets_a_document_s_chunks(engine: Any, store: Any) -> None:
    with make(engine, store) as cake:
        assert cake.prefill(LONG + QUESTION, mode="load").report.loaded_tokens == 0
        assert cake.prefill([SYSTEM, Document(LONG[1:]), QUESTION], mode="load").report.loaded_tokens == 0


@pytest.mark.parametrize("options", [{"tenant": "other"}, {"codec": "int8"}, {"reuse": None}])
def test_what_keeps_prefixes_apart_keeps_documents_apart(engine: Any, store: Any, options: Any) -> None:
    with make(engine, store, **{"learn": False, **options}) as cake:
        report = cake.prefill([SYSTEM, Document(LONG), QUESTION], mode="load").report
    assert (report.loaded_tokens, report.exact) == (0, True)


@pytest.mark.parametrize(
    "codec", ["int8:window=32", "kivi:window=32", "nuq3", "cachegen", "ladder:window=0", "turboquant"]
)
def test_codecs(engine: Any, codec: str) -> None:
    """What was encoded is as near to the exact cache at another position as where it was computed."""
    stored, exact = MemoryStore(), MemoryStore()
    learned(engine, stored, LONG, codec=codec)
    learned(engine, exact, LONG)
    errors = []
    for parts in ([Document(LONG), QUESTION], [SYSTEM, Document(LONG), QUESTION]):
        with make(engine, stored, "turned", codec=codec) as cake, make(engine, exact, "turned") as raw:
            prefill, expected = cake.prefill(parts, mode="load"), raw.prefill(parts, mode="load")
        assert prefill.report.loaded_tokens == len(LONG)
        pairs = zip(prefill.dynamic_cache().layers, expected.dynamic_cache().layers, strict=True)
        errors.append([(ours.keys - theirs.keys).norm() / theirs.keys.norm() for ours, theirs in pairs])
    assert prefill.report.reused_tokens == len(LONG)
    assert torch.allclose(torch.tensor(errors[0]), torch.tensor(errors[1]), rtol=0.2)
    assert 0 < max(errors[1]) < 0.4


def test_a_damaged_document_is_computed_and_learned_again(engine: Any, tmp_path: Path) -> None:
    parts: Any = [SYSTEM, Document(LONG), Document(OTHER), QUESTION]
    with DiskStore(tmp_path) as disk:
        learned(engine, disk, LONG, OTHER)
        for file in disk.path.glob("chunks/*/*.chunk"):
            damaged = bytearray(file.read_bytes())
            damaged[-3000] ^= 1
            file.write_bytes(damaged)
        with make(engine, disk) as cake:
            prefill = cake.prefill(parts, mode="load")
            assert prefill.report.exact
            assert any(reason.startswith("corrupt") for reason in prefill.report.miss_reasons())
            assert torch.allclose(prefill.logits, full(engine, flat(parts)), atol=1e-4)
            cake.wait_saved()
            again = cake.prefill([QUESTION, *parts[1:]], mode="load").report
    assert again.reused_tokens == len(LONG) + len(OTHER) - 2 * LINK


def test_two_prompts_at_once(engine: Any, store: Any) -> None:
    prompts: Any = [
        [SYSTEM, Document(LONG), Document(OTHER), QUESTION],
        [QUESTION, Document(OTHER), Document(LONG), SYSTEM],
    ]
    with make(engine, store) as cake:
        alone = [cake.prefill(prompt, mode="load", save=False).logits for prompt in prompts]
        again = [partial(cake.prefill, prompts[number % 2], mode="load", save=False) for number in range(6)]
        calls = [start(str(number), call) for number, call in enumerate(again)]
        for number, call in enumerate(calls):
            assert torch.allclose(call.result().logits, alone[number % 2], atol=1e-4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_learns_and_reuses(engine: Any, tmp_path: Path) -> None:
    with make(engine, f"{tmp_path}/kv?pack=yes") as cake:
        cake.prefill([SYSTEM, Document(LONG), QUESTION])
        cake.wait_saved()

        def child() -> None:
            assert cake.prefill([QUESTION, Document(LONG), QUESTION], mode="load").report.reused_tokens
            cake.prefill([SYSTEM, Document(OTHER), QUESTION])
            assert cake.wait_saved().failed_chunks == 0
            cake.close()

        in_child(child)
        again = cake.prefill([QUESTION, Document(OTHER), QUESTION], mode="load").report
    assert again.reused_tokens == len(OTHER) - LINK


def test_learning_that_is_interrupted_is_taken_up_again(engine: Any) -> None:
    store, document = MemoryStore(), tokens(9, 40 * CHUNK + 3)
    seen: list[int] = []
    with make(engine, store) as cake:
        offer = cake._learner.check

        def stop() -> None:
            seen.append(store.stats().chunks)
            if len(seen) > 4:
                cake._learner.closed = True
            offer()

        cake._learner.check = stop
        cake.prefill([SYSTEM, Document(document), QUESTION], save=True)
        cake.wait_saved()
    with make(engine, store) as cake:
        some = cake.prefill([QUESTION, Document(document), QUESTION], mode="load").report
        assert 0 < some.reused_tokens < len(document) - LINK, "what was saved of it serves"
        cake.wait_saved()
        all_of_it = cake.prefill([SYSTEM, Document(document), QUESTION, QUESTION], mode="load").report
        assert all_of_it.positions[-2].start + all_of_it.positions[-2].tokens == len(SYSTEM) + len(document)
        assert cake.learn(document).computed_tokens == 0


def test_learn_says_what_it_did_and_refuses_what_it_cannot_do(engine: Any) -> None:
    with make(engine, MemoryStore()) as cake:
        first = cake.learn(Document(LONG))
        assert (first.computed_tokens, first.exact) == (len(LONG), True)
        assert cake.wait_saved().saved_chunks == 6
        assert cake.learn(LONG).computed_tokens == 0
        with pytest.raises(BadInput, match="empty"):
            cake.learn(Document([]))
        with pytest.raises(BadInput, match="no tokenizer"):
            cake.learn("text")
    with make(engine, None) as cake, pytest.raises(BadInput, match="no store"):
        cake.learn(LONG)


def test_a_model_that_cannot_turn_its_keys_is_refused_with_the_reason() -> None:
    for name, reason in (("gpt2", "RoPE"), ("deepseek-v3", "are not those that it computes there")):
        engine = TransformersEngine(build(name))
        with pytest.raises(BadInput, match=reason):
            Cake(engine, reuse="epic")
        Cake(engine, reuse="naive").close()


def test_more_time_to_compute_makes_more_of_a_prompt_exact(engine: Any, store: Any) -> None:
    """The front arm takes documents as far as it gets; what it computes before anything reused is exact."""
    exact = []
    for chunk_s in (1e-6, 0.02, 60.0):
        with make(engine, store, learn=False) as cake:
            cake.compute_cost.observe(0, 2 * CHUNK, 0.02)
            for number in range(20):
                cake.load_costs[0].observe(16_000, number * chunk_s, (number + 1) * chunk_s)
            runs = cake.plan([SYSTEM, Document(LONG), Document(OTHER), QUESTION])
        loaded = [run.start for run in runs if run.how != "compute"]
        exact.append(min(loaded, default=len(LONG) + len(OTHER)))
    assert exact == sorted(exact)
    assert exact[0] < exact[1] < exact[2], exact
