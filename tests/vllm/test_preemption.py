"""What preempted requests leave behind: blocks that hold what their hashes say, and that do not stand in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
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


@pytest.mark.parametrize("stored", [0, 1000])
def test_reset_while_a_step_that_was_scheduled_ahead_is_on_its_way(
    model: Path, plain: dict[int, list[int]], stored: int
) -> None:
    options = {"store": f"scripted://on its way {stored}", "mode": "both", "load_deadline": PATIENCE_S}
    with closing(TinyEngine(model, options, scheduler_cls="cakekv.vllm.CakeAsyncScheduler")) as engine:
        engine.schedule_ahead()
        if stored:
            engine.run(prompt(stored))
            engine.settle()
            assert engine.core.reset_prefix_cache()
        request = engine.add(prompt(1000))
        engine.until(lambda: engine.internal(request).num_computed_tokens)
        assert engine.core.batch_queue, "a step is on its way"
        assert engine.core.reset_prefix_cache(reset_running_requests=True)
        assert engine.finish(request) == [plain[1000]]
        engine.settle()
        engine.assert_nothing_leaked()
