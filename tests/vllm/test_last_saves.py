"""What became of the last saves is said without another request, and a store that hangs keeps no engine busy."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY
from tiny_engine import ScriptedStore, TinyEngine, prompt

from cakekv.vllm.scheduling import last_saves

CHUNKS = 4


@pytest.fixture
def saving(engine: TinyEngine, store: ScriptedStore) -> TinyEngine:
    """An engine whose only request is answered, while none of its chunks is written yet."""
    store.takes.clear()
    engine.run(prompt(600, seed=60))
    engine.step(3)
    return engine


def saved() -> float:
    """Chunks that were saved, as `/metrics` has it."""
    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "cakekv:saved_chunks_total"
    )


def test_the_metrics_of_the_last_saves_need_no_other_request(saving: TinyEngine, store: ScriptedStore) -> None:
    before = saved()
    assert not saving.scheduler.requests
    assert saving.scheduler.has_requests()
    store.takes.set()
    saving.until(lambda: not saving.scheduler.has_requests())
    assert saved() == before + CHUNKS


def test_a_chunk_that_could_not_be_saved_last_is_told_of(saving: TinyEngine, store: ScriptedStore) -> None:
    store.broken = None
    store.takes.set()
    saving.until(lambda: not saving.scheduler.has_requests())
    assert not saving.worker.saves.unsaid
    store.broken = set()
    saving.run(prompt(600, seed=60))
    saving.settle()
    assert len(list(store)) == CHUNKS


def test_nothing_is_expected_of_a_store_that_hangs(
    saving: TinyEngine, store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved()
    monkeypatch.setattr(last_saves, "_HANGS_S", 0.0)
    assert not saving.scheduler.has_requests()
    store.takes.set()
    saving.settle()
    saving.run(prompt(100, seed=61))  # too short to be saved
    saving.until(lambda: saved() == before + CHUNKS)


def test_who_ends_all_requests_waits_for_no_save(saving: TinyEngine, store: ScriptedStore) -> None:
    from vllm.v1.request import RequestStatus

    saving.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not saving.scheduler.has_requests()
    store.takes.set()
    saving.settle()
