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
            assert (engine.report().loaded_tokens if start else len(engine.half.reports)) == (896 if start else 0)
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
        assert engine.half.reports
