"""Blocks that a preempted request leaves behind hold what their hashes say."""

from __future__ import annotations

from pathlib import Path

from tiny_engine import BLOCK, PATIENCE_S, TinyEngine, closing, prompt, sampling, scripted


def test_tokens_that_a_preemption_takes_back_are_neither_shared_nor_saved(model: Path) -> None:
    """With priorities, vLLM preempts requests that it has just given tokens, and keeps the hashes of their blocks."""
    setup = {
        "scheduling_policy": "priority",
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 2 * BLOCK,
        "num_gpu_blocks_override": 11,
        "max_model_len": 1024,
    }
    low, high, three = prompt(900), prompt(380, seed=1), sampling(3)
    with closing(TinyEngine(model, **setup)) as engine:
        expected = [engine.run(low, three), engine.run(high, three)]
    options = {"store": "scripted://taken back", "mode": "load", "load_deadline": PATIENCE_S}
    with closing(TinyEngine(model, options, **setup)) as engine:
        requests = [engine.add(low, three, priority=1)]
        engine.step()
        requests.append(engine.add(high, three))
        engine.until(lambda: engine.internal(requests[0]).num_preemptions)
        assert engine.finish(*requests) == expected
        engine.settle()
        assert len(list(scripted("taken back"))) == 7 + 2
        assert engine.core.reset_prefix_cache()
        assert engine.run(low, three) == expected[0]
        engine.settle()
        assert engine.report().loaded_tokens == 896
        engine.assert_nothing_leaked()
