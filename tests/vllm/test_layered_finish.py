"""The suffix's forward pass waits in its layers for the last chunks; whatever becomes of them, the answer is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from tiny_engine import ScriptedStore, TinyEngine, prompt, sampling

from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures

CHUNKS = 7
GROUPS = 3


@pytest.fixture
def layered(engine: TinyEngine, stored: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stored prompt, and an engine that takes computing for very slow: it has everything loaded but the suffix."""
    engine.fill_cache(3.0)  # else what earlier runs left in the blocks would do for what does not come
    engine.set(layered_finish=True, mode="auto")
    compute = ComputeCost(ComputeShape(0.01, 0.01, 0.0), trusted=True)
    monkeypatch.setattr(engine.half.costs, "cost", compute)
    monkeypatch.setattr(compute, "observe", lambda *observed: None)
    monkeypatch.setattr(engine.half.loads, "tiers", engine.half.loads.tiers)
    take_loads_for(engine, 0.05)
    return stored


def take_loads_for(engine: TinyEngine, seconds: float) -> None:
    """Have the engine expect that a chunk takes so long to load."""
    loads = engine.half.loads
    figures = LoadFigures(
        byte_s=seconds / loads.chunk_bytes, load_s=seconds, alone_s=seconds, load_bytes=loads.chunk_bytes
    )
    loads.tiers = [tier._replace(cost=LoadCost(tier.depth, figures)) for tier in loads.tiers]


@pytest.fixture
def in_mid_forward(
    engine: TinyEngine, store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[int]]:
    """Keeps all loads back until a layer waits for them; does something then, and lets them go."""
    awaited: list[int] = []

    def prepare(action: Callable[[], None] = store.gate.set) -> list[int]:
        wait = engine.worker.loads.wait

        def wait_and_act(numbers: list[int], until: float) -> bool:
            if not awaited:
                action()
            awaited.append(len(numbers))
            return wait(numbers, until)

        monkeypatch.setattr(engine.worker.loads, "wait", wait_and_act)
        store.gate.clear()
        return awaited

    return prepare


def test_the_suffix_begins_before_anything_has_arrived(
    engine: TinyEngine, layered: list[int], plain: dict[int, list[int]], in_mid_forward: Callable[..., list[int]]
) -> None:
    awaited = in_mid_forward()
    assert engine.run(layered) == plain[1000]
    # Two were ordered before anything was planned; they come whole.
    assert awaited == [CHUNKS] + [CHUNKS - 2] * (GROUPS - 1)
    report = engine.report()
    assert (report.loaded_tokens, report.computed_tokens, report.recomputed_tokens) == (896, 104, 0)
    assert [(span.start, span.tokens) for span in report.spans] == [(896, 104)]
    assert report.spans[0].began_s < min(load.ended_s for load in report.loads)
    assert Counter(load.group for load in report.loads) == {None: 2} | dict.fromkeys(range(GROUPS), CHUNKS - 2)
    assert not report.notes
    # vLLM shares it like any other prefix.
    engine.settle()
    before = len(engine.half.outcomes.latest)
    assert engine.run(layered) == plain[1000]
    assert len(engine.half.outcomes.latest) == before


def test_the_suffix_is_saved(
    engine: TinyEngine, store: ScriptedStore, layered: list[int], in_mid_forward: Callable[..., list[int]]
) -> None:
    longer = [*layered, *prompt(100, seed=9)]
    engine.set(mode="compute", save=False)
    expected = engine.run(longer)
    engine.core.reset_prefix_cache()
    engine.set(mode="auto", save=True)
    assert len(list(store)) == CHUNKS
    assert in_mid_forward() == []
    assert engine.run(longer) == expected
    engine.settle()
    assert engine.report().spans[0].began_s < min(load.ended_s for load in engine.report().loads)
    assert len(list(store)) == CHUNKS + 1
    engine.core.reset_prefix_cache()
    engine.set(mode="load")
    assert engine.run(longer) == expected
    assert engine.report().loaded_tokens == (CHUNKS + 1) * 128


def test_part_is_computed_before(
    engine: TinyEngine, layered: list[int], plain: dict[int, list[int]], in_mid_forward: Callable[..., list[int]]
) -> None:
    """The first chunk is computed, as mode "both" wants; its step already asks for the rest in pieces."""
    engine.set(mode="both")
    awaited = in_mid_forward()
    assert engine.run(layered) == plain[1000]
    report = engine.report()
    assert [(span.start, span.tokens) for span in report.spans] == [(0, 128), (896, 104)]
    assert awaited[0] >= CHUNKS - 1
    assert report.loaded_tokens == 768
    assert report.spans[1].began_s < max(load.ended_s for load in report.loads)


def test_a_single_token(
    engine: TinyEngine, layered: list[int], plain: dict[int, list[int]], in_mid_forward: Callable[..., list[int]]
) -> None:
    in_mid_forward()
    assert engine.run(layered, sampling(1)) == plain[1000][:1]
    assert engine.report().loaded_tokens == 896


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("trouble", ["corrupt", "missing", "failing", "late"])
def test_a_piece_that_does_not_come(
    engine: TinyEngine,
    store: ScriptedStore,
    layered: list[int],
    plain: dict[int, list[int]],
    in_mid_forward: Callable[..., list[int]],
    trouble: str,
    tokens: int,
) -> None:
    request = ""

    def spoil() -> None:
        key = engine.shard_keys(request)[3]
        if trouble == "corrupt":
            store.damage(key)
        elif trouble == "missing":
            store.delete([key])
        elif trouble == "failing":
            store.broken = {key}
        if trouble != "late":
            store.gate.set()

    if trouble == "late":
        engine.set(load_deadline=0.2)
    awaited = in_mid_forward(spoil)
    request = engine.add(layered, sampling(tokens))
    assert engine.finish(request) == [plain[1000][:tokens]]
    assert awaited
    report = engine.report()
    assert len(report.notes) == 1
    assert "had to begin again" in report.notes[0]
    assert report.computed_tokens + report.loaded_tokens == 1000
    assert report.recomputed_tokens >= 128
    store.gate.set()
    engine.settle()
    store.recover()
    # Nothing wrong has stayed behind, neither in vLLM's own cache nor in the store.
    engine.set(layered_finish=False)
    assert engine.run(layered) == plain[1000]
    engine.settle()
    engine.core.reset_prefix_cache()
    engine.set(mode="load")
    assert engine.run(layered) == plain[1000]


@pytest.mark.parametrize("corrupt", [False, True])
def test_aborted_in_mid_forward(
    engine: TinyEngine,
    store: ScriptedStore,
    layered: list[int],
    plain: dict[int, list[int]],
    in_mid_forward: Callable[..., list[int]],
    corrupt: bool,
) -> None:
    request = ""

    def abort() -> None:
        if corrupt:
            store.damage(engine.shard_keys(request)[3])
        engine.core.aborts_queue.put([engine.internal(request).request_id])
        store.gate.set()

    awaited = in_mid_forward(abort)
    request = engine.add(layered)
    engine.until(lambda: awaited)
    engine.settle()
    engine.assert_nothing_leaked()
    engine.set(layered_finish=False)
    assert engine.run(layered) == plain[1000]


def test_nobody_is_held_up(
    engine: TinyEngine, store: ScriptedStore, layered: list[int], plain: dict[int, list[int]]
) -> None:
    """Beside a request that decodes, the suffix waits for whole chunks."""
    other = engine.add(prompt(300, seed=5), sampling(200))
    engine.until(lambda: other in engine.outputs)
    request = engine.add(layered)
    assert engine.finish(request) == [plain[1000]]
    assert not engine.outputs[other].finished
    report = engine.report()
    assert report.prompt_tokens == 1000
    assert report.loaded_tokens == 896
    assert all(load.group is None for load in report.loads)
    assert engine.finish(other)[0][:6] == plain[300]


def test_somebody_comes_when_pieces_are_on_their_way(
    engine: TinyEngine, store: ScriptedStore, layered: list[int], plain: dict[int, list[int]]
) -> None:
    """Pieces were asked for during the step before; then the suffix waits for all of them, and the other goes on."""
    engine.set(mode="both")
    take_loads_for(engine, 0.25)
    store.gate.clear()
    request = engine.add(layered)
    engine.until(lambda: engine.restoration(request) and engine.restoration(request).planner.in_pieces)
    other = engine.add(prompt(300, seed=5))
    assert engine.finish(other) == [plain[300]]
    assert not engine.outputs.get(request)
    store.gate.set()
    assert engine.finish(request) == [plain[1000]]
    report = next(report for _, report in engine.half.outcomes.latest if report.prompt_tokens == 1000 and report.loads)
    assert any(load.group is not None for load in report.loads)


def test_what_cannot_be_taken_back_is_not_tried(
    engine: TinyEngine, layered: list[int], plain: dict[int, list[int]]
) -> None:
    assert engine.run(layered, sampling(prompt_logprobs=1, skip_reading_prefix_cache=False)) == plain[1000]
    assert engine.report().loaded_tokens == 896
    assert all(load.group is None for load in engine.report().loads)


def test_a_suffix_of_more_than_a_step_waits(engine: TinyEngine, layered: list[int]) -> None:
    engine.run([*layered, *prompt(300, seed=9)])
    report = engine.report()
    assert report.prompt_tokens == 1300
    assert report.loaded_tokens
    assert all(load.group is None for load in report.loads)
