"""Whatever happens in mid-restore, the request ends as plain vLLM's would, and no block is lost (see `engine`)."""

from __future__ import annotations

import pytest
from tiny_engine import RequestOutputKind, ScriptedStore, TinyEngine, prompt, sampling


@pytest.mark.parametrize("mode", ["load", "both"])
def test_abort_in_mid_load(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]], mode: str
) -> None:
    """Parked (load), and already computing (both). The blocks are free although the readers still hang."""
    engine.set(mode=mode)
    request = engine.hang(store, stored, loaded=1)
    engine.step(2)
    engine.llm.llm_engine.abort_request([request])
    engine.settle()
    engine.assert_nothing_leaked()
    store.gate.set()
    assert engine.run(stored) == plain[1000]


def test_two_aborted_together(engine: TinyEngine, store: ScriptedStore, stored: list[int]) -> None:
    engine.run(prompt(1500, seed=3))
    engine.settle()
    engine.core.reset_prefix_cache()
    engine.set(mode="load")
    first = engine.hang(store, stored, loaded=1)
    second = engine.add(prompt(1500, seed=3))
    engine.until(lambda: engine.restoration(second))
    engine.llm.llm_engine.abort_request([first, second])
    engine.settle()
    engine.assert_nothing_leaked()


@pytest.mark.parametrize("mode", ["load", "both"])
@pytest.mark.parametrize("trouble", ["corrupt", "missing", "failing", "swapped"])
def test_a_bad_chunk(
    engine: TinyEngine,
    store: ScriptedStore,
    stored: list[int],
    plain: dict[int, list[int]],
    mode: str,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.set(mode=mode)
    engine.loads_first = True
    engine.expect(compute_s=1.0)
    # Behind the look-up: the store's answers are still those of before.
    store.answers.clear()
    request = engine.add(stored)
    engine.step()
    keys = engine.shard_keys(request)
    found = store.inner.lookup(keys)
    monkeypatch.setattr(store.inner, "lookup", lambda wanted: found)
    if trouble == "corrupt":
        store.damage(keys[5])
    elif trouble == "missing":
        store.delete([keys[5]])
    elif trouble == "swapped":
        store.inner.write(keys[5], memoryview(store.content(keys[4])))
    else:
        store.broken = {keys[5]}
    store.answers.set()
    assert engine.finish(request) == [plain[1000]]
    monkeypatch.undo()
    engine.settle()
    report = engine.report()
    assert report.recomputed_tokens == 128
    spans = [(640, 128), (896, 104)] if mode == "load" else [(0, 128), (640, 128), (896, 104)]
    assert [(span.start, span.tokens) for span in report.spans] == spans
    # What was recomputed is stored again.
    store.recover()
    engine.core.reset_prefix_cache()
    engine.set(mode="load")
    assert engine.run(stored) == plain[1000]
    engine.settle()
    assert engine.report().loaded_tokens == 896


def test_a_late_chunk_is_computed(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="load", load_deadline=0.2)
    stopped = engine.hang(store, stored, loaded=1)
    assert engine.finish(stopped) == [plain[1000]]
    engine.settle()
    assert (engine.report().loaded_tokens, engine.report().recomputed_tokens) == (128, 256)
    # All readers hang: the next request does not even wait for them.
    engine.core.reset_prefix_cache()
    before = len(engine.half.outcomes.latest)
    assert engine.run(stored) == plain[1000]
    assert len(engine.half.outcomes.latest) == before
    store.gate.set()
    engine.settle()


def test_a_dead_store(engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]) -> None:
    engine.set(mode="load")
    store.gate.clear()
    request = engine.add(stored)
    engine.until(lambda: len(store.opened) > 1)
    store.broken = None
    store.gate.set()
    assert engine.finish(request) == [plain[1000]]
    engine.settle()
    assert engine.report().loaded_tokens == 0
    assert engine.run(prompt(300, seed=5)) == plain[300]


def test_a_store_that_does_not_answer(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    patience_s, engine.half.lookup.patience_s = engine.half.lookup.patience_s, 0.1
    try:
        store.answers.clear()
        assert engine.run(stored) == plain[1000]
    finally:
        engine.half.lookup.patience_s = patience_s


def test_reset_of_the_prefix_cache_in_mid_load(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="both")
    request = engine.hang(store, stored, loaded=1)
    engine.step(2)
    assert not engine.core.reset_prefix_cache()
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    store.gate.set()
    assert engine.finish(request) == [plain[1000]]


def test_reset_while_all_is_parked(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="load")
    request = engine.hang(store, stored, loaded=1)
    assert engine.restoration(request).parked
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    store.gate.set()
    assert engine.finish(request) == [plain[1000]]


def test_reset_when_one_was_aborted_that_had_loaded_everything(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="load")
    engine.loads_first = True
    request = engine.add(stored)
    engine.until(lambda: engine.restoration(request) and not engine.restoration(request).loading)
    assert engine.restoration(request).parked
    engine.llm.llm_engine.abort_request([request])
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    assert engine.run(stored) == plain[1000]


def test_after_a_reset_of_the_connector_nothing_old_is_loaded(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    """Weights may have been changed: chunks of the old ones must not be found."""
    before = len(engine.half.outcomes.latest)
    assert engine.core.reset_prefix_cache(reset_connector=True)
    store.opened.clear()
    assert engine.run(stored) == plain[1000]
    engine.settle()
    assert len(engine.half.outcomes.latest) == before
    assert not store.opened


def test_who_waits_at_such_a_reset_asks_again(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    """What was found for it has another name now, and is computed and saved under that."""
    engine.set(mode="load")
    request = engine.hang(store, stored, loaded=1)
    writes, ended = store.writes, len(engine.half.outcomes.latest)
    assert engine.core.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    store.gate.set()
    assert engine.finish(request) == [plain[1000]]
    engine.settle()
    assert len(engine.half.outcomes.latest) == ended + 1, "only the restore that was broken off"
    assert store.writes == writes + 7


def test_what_was_computed_before_such_a_reset_is_not_saved_after_it(
    engine: TinyEngine, store: ScriptedStore, plain: dict[int, list[int]]
) -> None:
    request = engine.add(prompt(1500, seed=3))
    engine.until(lambda: engine.internal(request).num_computed_tokens >= 512)
    assert not engine.core.reset_prefix_cache(reset_connector=True), "it is running"
    engine.settle()
    before = len(list(store))
    assert engine.finish(request) == [plain[1500]]
    engine.settle()
    assert len(list(store)) == before


def test_pause_and_resume(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="both")
    request = engine.hang(store, stored, loaded=1)
    engine.core.pause_scheduler(mode="keep")
    engine.step(5)
    assert not engine.scheduler.has_unfinished_requests()
    store.gate.set()
    engine.core.resume_scheduler()
    assert engine.finish(request) == [plain[1000]]


def test_preempted_in_mid_load(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="both")
    request = engine.hang(store, stored, loaded=1)
    engine.until(lambda: not engine.restoration(request).parked)
    internal = engine.internal(request)
    engine.scheduler.running.remove(internal)
    engine.scheduler._preempt_request(internal, 0.0)
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() < pool.num_gpu_blocks - 1  # a reader may still write
    store.gate.set()
    assert engine.finish(request) == [plain[1000]]


def test_several_answers_and_prompt_logprobs(
    engine: TinyEngine, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="load")
    request = engine.add(stored, sampling(n=3, temperature=1.0, top_k=1, output_kind=RequestOutputKind.FINAL_ONLY))
    engine.finish(request)
    assert [list(output.token_ids) for output in engine.outputs[request].outputs] == [plain[1000]] * 3
    engine.core.reset_prefix_cache()
    request = engine.add(stored, sampling(prompt_logprobs=1))
    assert engine.finish(request) == [plain[1000]]
    assert len(engine.outputs[request].prompt_logprobs) == 1000
