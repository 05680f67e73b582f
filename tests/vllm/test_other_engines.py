"""Engines set up in other ways: larger chunks, no prefix caching, little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_engine import BLOCK, TinyEngine, closing, prompt, sampling, scripted


def test_chunks_of_several_blocks_behind_a_local_hit_within_one(model: Path, plain: dict[int, list[int]]) -> None:
    store = scripted("wide")
    options = {"store": "scripted://wide", "chunk_tokens": 3 * BLOCK, "mode": "load"}
    with closing(TinyEngine(model, options)) as engine:
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        assert len(list(store)) == 2
        engine.core.reset_prefix_cache()
        engine.set(mode="compute")
        engine.run(prompt(1000)[:140])
        engine.settle()
        engine.set(mode="load")
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        # One block of the first chunk is there, so that the rest of it has to be computed.
        assert [(span.start, span.tokens) for span in engine.report().spans] == [(128, 256), (768, 232)]
        assert engine.report().loaded_tokens == 3 * BLOCK
        engine.assert_nothing_leaked()


def test_without_prefix_caching_and_after_a_restart(model: Path, plain: dict[int, list[int]], tmp_path: Path) -> None:
    for start in range(2):
        with closing(
            TinyEngine(model, {"store": str(tmp_path), "mode": "load"}, enable_prefix_caching=False)
        ) as engine:
            assert engine.run(prompt(1000)) == plain[1000]
            engine.settle()
            assert (engine.report().loaded_tokens if start else len(engine.half.outcomes.latest)) == (
                896 if start else 0
            )
            engine.assert_nothing_leaked()


def test_in_bfloat16_as_models_come(model: Path, plain: dict[int, list[int]]) -> None:
    with closing(TinyEngine(model, dtype="bfloat16")) as engine:
        expected = engine.run(prompt(1000))
    store = scripted("bfloat16")
    with closing(TinyEngine(model, {"store": "scripted://bfloat16", "mode": "load"}, dtype="bfloat16")) as engine:
        assert engine.run(prompt(1000)) == expected
        engine.settle()
        engine.core.reset_prefix_cache()
        assert engine.run(prompt(1000)) == expected
        engine.settle()
        assert engine.report().loaded_tokens == 896
        assert len(list(store)) == 7
        engine.assert_nothing_leaked()


@pytest.fixture(scope="module")
def crowded_reference(model: Path, plain: dict[int, list[int]]) -> list[list[int]]:
    """What plain vLLM, with memory enough, generates for four long requests."""
    with closing(TinyEngine(model)) as engine:
        return engine.finish(*[engine.add(prompt(600, seed), sampling(150)) for seed in range(4)])


@pytest.mark.parametrize("resume", [False, True], ids=["direct", "resume"])
def test_preemption_in_little_memory(model: Path, crowded_reference: list[list[int]], resume: bool) -> None:
    """Sixteen blocks for four requests that need six each, twice: computed, and restored."""
    options = {"store": f"scripted://crowded{resume}", "mode": "both"}
    with closing(TinyEngine(model, options, num_gpu_blocks_override=17, max_model_len=1024)) as engine:
        engine.scheduler.resume_to_jump = resume
        preempted = []
        original = engine.scheduler._preempt_request
        engine.scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(args), original(*args, **kwargs))
        for _ in range(2):
            requests = [engine.add(prompt(600, seed), sampling(150)) for seed in range(4)]
            assert engine.finish(*requests) == crowded_reference
            engine.settle()
            engine.assert_nothing_leaked()
            engine.core.reset_prefix_cache()
        assert preempted
        assert engine.half.outcomes.latest


def test_steps_that_are_scheduled_ahead(model: Path, plain: dict[int, list[int]]) -> None:
    """The asynchronous scheduler, with vLLM's queue of batches."""
    store = scripted("ahead")
    options = {"store": "scripted://ahead", "mode": "both"}
    with closing(TinyEngine(model, options, scheduler_cls="cakekv.vllm.CakeAsyncScheduler")) as engine:
        engine.schedule_ahead()
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        for abort in (False, True, False):
            engine.core.reset_prefix_cache()
            store.recover()
            request = engine.hang(store, prompt(1000), loaded=2)
            if abort:
                engine.step(2)
                engine.llm.llm_engine.abort_request([request])
            else:
                engine.overtake()
                assert engine.finish(request) == [plain[1000]]
                report = engine.report()
                assert (report.computed_tokens, report.loaded_tokens) == (744, 256)
            engine.settle()
            engine.assert_nothing_leaked()
            store.gate.set()


@pytest.mark.parametrize("restores", [1, 2, 3])
def test_restores_that_find_no_place_do_not_stop_those_that_have_one(model: Path, restores: int) -> None:
    """They came first and want whole steps, but the only place is taken: by one that has to be computed to leave it."""
    options = {"store": "scripted://crowded", "mode": "load"}
    store = scripted("crowded")
    with closing(TinyEngine(model, max_num_seqs=1)) as engine:
        prompts = [*(prompt(2000, seed) for seed in range(10, 10 + restores)), prompt(2500, seed=4)]
        expected = [engine.run(tokens) for tokens in prompts]
    with closing(TinyEngine(model, options, max_num_seqs=1)) as engine:
        store.empty()
        for seed in range(10, 10 + restores):
            engine.run(prompt(1000, seed))
        engine.settle()
        assert engine.core.reset_prefix_cache()
        store.gate.clear()
        first = [engine.add(tokens) for tokens in prompts[:-1]]  # 1,104 tokens behind what is stored
        engine.until(lambda: all(engine.restoration(request) for request in first))
        last = engine.add(prompts[-1])
        engine.until(lambda: engine.internal(last).num_computed_tokens)
        store.gate.set()
        engine.until(lambda: all(engine.restoration(request).joined for request in first))
        assert engine.internal(last).num_computed_tokens < 2500
        steps = []
        step = engine.step
        engine.step = lambda times=1: (steps.append(times), step(times))
        assert engine.finish(*first, last) == expected
        # Nothing is waited for any more: steps of 256 tokens for all that is left of the prompts, and the answers.
        assert len(steps) <= 2500 / 256 + restores * 1104 / 256 + 6 * (restores + 1) + 20
        engine.settle()
        assert engine.report().loaded_tokens == 896
        engine.assert_nothing_leaked()


def test_prefills_that_vllm_holds_back_between_decodes(model: Path, plain: dict[int, list[int]]) -> None:
    """vLLM 0.33 computes prompts in every fourth step only while somebody decodes; loads go on meanwhile."""
    store = scripted("held")
    options = {"store": "scripted://held", "mode": "both", "decode_slowdown": 0.0}
    with closing(TinyEngine(model, options, prefill_schedule_interval=4)) as engine:
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        engine.core.reset_prefix_cache()
        decoding = engine.add(prompt(300, seed=5), sampling(200))
        engine.until(lambda: engine.outputs.get(decoding))
        restored, computed = engine.hang(store, prompt(1000), loaded=2), engine.add(prompt(1500, seed=3))
        engine.overtake()
        assert engine.finish(restored, computed) == [plain[1000], plain[1500]]
        assert engine.report().loaded_tokens == 2 * BLOCK
        store.gate.set()
        assert engine.finish(decoding)[0][:6] == plain[300]
        engine.settle()
        engine.assert_nothing_leaked()
