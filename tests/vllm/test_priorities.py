"""Who gets the tokens of a step: decodes, then plain prefills, then prompts that may be loaded."""

from __future__ import annotations

import math

import pytest
from tiny_engine import ScriptedStore, TinyEngine, prompt, sampling

from cakekv.restore.priority import RequestState


class Steps:
    """What every step of an engine computes, by request."""

    def __init__(self, engine: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, int]] = []
        original = engine.scheduler.schedule

        def schedule(throttle_prefills: bool = False) -> object:
            output = original(throttle_prefills)
            if output.num_scheduled_tokens:
                self.steps.append({key.partition("-")[0]: n for key, n in output.num_scheduled_tokens.items()})
            return output

        monkeypatch.setattr(engine.scheduler, "schedule", schedule)


@pytest.fixture
def steps(engine: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(engine, monkeypatch)


def test_plain_prefill_goes_before_stored_prefill(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]], steps: Steps
) -> None:
    """The stored prompt came first; as long as it can load, the plain one gets the tokens, all but decodes'."""
    engine.set(mode="both")
    decoding = engine.add(prompt(20, seed=8), sampling(40))
    engine.until(lambda: decoding in engine.outputs)
    steps.steps.clear()
    store.gate.clear()
    restored = engine.add(stored)
    engine.until(lambda: engine.restoration(restored))
    begun = len(steps.steps)
    other = engine.add(prompt(1500, seed=3))
    assert engine.finish(other) == [plain[1500]]
    contended = [step for step in steps.steps[begun:] if step.get(other, 0) > 1]
    assert all(step[decoding] == 1 for step in contended)
    # The last step of its prefill leaves some over.
    assert all(step.get(restored, 0) == 0 for step in contended[:-1])
    assert sum(step[other] for step in contended) == 1500
    store.gate.set()
    assert engine.finish(restored) == [plain[1000]]
    engine.finish(decoding)


def test_loads_begin_although_others_use_up_every_step(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]], steps: Steps
) -> None:
    """A stored prompt behind a long plain one is taken in at once, so that its loads begin."""
    engine.set(mode="load")
    engine.loads_first = True
    other = engine.add(prompt(1500, seed=3))
    engine.step()
    restored = engine.add(stored)
    engine.until(lambda: engine.restoration(restored))
    assert not engine.outputs.get(other)
    engine.until(lambda: engine.restoration(restored).joined)
    assert not engine.outputs.get(other), "its loads ended while the other was still being computed"
    assert engine.finish(other, restored) == [plain[1500], plain[1000]]


def test_a_step_is_used_to_its_last_token(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]], steps: Steps
) -> None:
    """Beside a decode a restore gets the rest, which is no whole number of chunks."""
    engine.set(mode="both", decode_slowdown=0.0)
    decoding = engine.add(prompt(20, seed=8), sampling(30))
    engine.until(lambda: decoding in engine.outputs)
    store.gate.clear()
    restored = engine.add(stored)
    assert engine.finish(restored) == [plain[1000]]
    engine.settle()
    spans = [(span.start, span.tokens) for span in engine.report().spans]
    assert any(tokens == 255 for _, tokens in spans)
    assert sum(tokens for _, tokens in spans) + engine.report().loaded_tokens == 1000


def test_decodes_do_not_wait_for_what_can_be_loaded(
    engine: TinyEngine,
    stored: list[int],
    plain: dict[int, list[int]],
    steps: Steps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a step's time to spare, a restore computes nothing beside a decode but its suffix."""
    engine.set(mode="auto", decode_slowdown=1.0)
    monkeypatch.setattr(RequestState, "gives_way", True)
    monkeypatch.setattr(engine.half.policy, "starvation_s", math.inf)
    assert engine.finish(engine.add(stored)) == [plain[1000]]  # so that costs are known
    engine.finish(engine.add(prompt(20, seed=9), sampling(20)))
    engine.settle()
    engine.core.reset_prefix_cache()
    decoding = engine.add(prompt(20, seed=8), sampling(3000))
    engine.until(lambda: decoding in engine.outputs)
    steps.steps.clear()
    engine.half.latest_share = (
        0.0  # as if decodes had kept restores from computing for a while, so that all is to be loaded
    )
    restored = engine.add(stored)
    assert engine.finish(restored) == [plain[1000]]
    beside = [step[restored] for step in steps.steps if restored in step and decoding in step]
    assert beside[0] == 1000 - 896
    assert set(beside[1:]) <= {1}
    engine.llm.llm_engine.abort_request([decoding])
    engine.settle()
    assert engine.report().loaded_tokens == 896
