"""The real engine on a tiny model restores prompts from both ends, with the output of plain vLLM."""

from __future__ import annotations

import pytest
from tiny_engine import BLOCK, ScriptedStore, TinyEngine, prompt, sampling

from cakekv.chunk import segments, verify_chunk


def test_both_ends(engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]) -> None:
    store.gate.clear()
    store.let_through = 2
    request = engine.add(stored)
    engine.until(lambda: engine.restoration(request) and len(store.opened) == 4)
    assert engine.finish(request) == [plain[1000]]
    report = engine.report()
    assert (report.computed_tokens, report.loaded_tokens, report.met_at) == (744, 256, 640)


def test_loaded_blocks_hold_the_stored_bytes(engine: TinyEngine, store: ScriptedStore, stored: list[int]) -> None:
    engine.set(mode="load")
    engine.fill_cache(0)
    request = engine.add(stored)
    engine.until(lambda: engine.restoration(request) and engine.restoration(request).joined)
    keys = engine.shard_keys(request)
    block_ids = engine.scheduler.kv_cache_manager.get_block_ids(engine.internal(request).request_id)[0]
    blocks = BLOCK // engine.scheduler.block_size
    for chunk in range(7):
        content = bytearray(store.content(keys[chunk]))
        header = verify_chunk(memoryview(content))
        held = [bytearray(size) for size in header.lengths]
        of_chunk = block_ids[chunk * blocks : (chunk + 1) * blocks]
        engine.worker.shards[0].cache.gather(of_chunk, [memoryview(part) for part in held])()
        assert held == [bytearray(part) for part in segments(header.shape, memoryview(content))]
        assert any(held[0])
    engine.finish(request)


def test_throwing_loads_away_changes_the_output(
    engine: TinyEngine, stored: list[int], plain: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: what is compared above depends on what is loaded."""
    engine.set(mode="load")
    engine.fill_cache(0)
    monkeypatch.setattr(engine.worker.shards[0].cache, "place", lambda block_ids, segments: None)
    assert engine.run(stored) != plain[1000]
    monkeypatch.undo()
    engine.settle()
    engine.core.reset_prefix_cache()
    assert engine.run(stored) == plain[1000]


@pytest.mark.parametrize("mode", ["auto", "compute", "load", "both"])
def test_modes(engine: TinyEngine, stored: list[int], plain: dict[int, list[int]], mode: str) -> None:
    engine.set(mode=mode)
    before = len(engine.half.outcomes.latest)
    assert engine.run(stored) == plain[1000]
    engine.settle()
    if mode == "compute":
        assert len(engine.half.outcomes.latest) == before
        return
    report = engine.report()
    assert report.mode == mode
    assert report.computed_tokens + report.loaded_tokens == 1000
    if mode == "load":
        assert report.loaded_tokens == 896
    if mode == "both":
        assert report.computed_tokens > 104


@pytest.mark.parametrize("resume", [False, True], ids=["direct", "resume"])
def test_jumps(
    engine: TinyEngine,
    store: ScriptedStore,
    stored: list[int],
    plain: dict[int, list[int]],
    resume: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loaded chunks with a hole between them: compute jumps twice."""
    monkeypatch.setattr(engine.scheduler, "resume_to_jump", resume)
    keys = engine.shard_keys(engine.add(stored, sampling(1)))
    store.delete([keys[4], keys[0]])
    engine.settle()
    engine.core.reset_prefix_cache()
    store.delete([keys[4], keys[0]])
    engine.set(mode="load")
    assert engine.run(stored) == plain[1000]
    engine.settle()
    report = engine.report()
    assert report.loaded_tokens == 5 * BLOCK
    assert [(span.start, span.tokens) for span in report.spans] == [(0, 128), (512, 128), (896, 104)]


def test_behind_a_local_hit(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="compute")
    engine.run(stored[:300])
    engine.settle()
    engine.set(mode="load")
    store.opened.clear()
    assert engine.run(stored) == plain[1000]
    engine.settle()
    assert len(store.opened) == 5
    assert engine.report().loaded_tokens == 5 * BLOCK
    assert [(span.start, span.tokens) for span in engine.report().spans] == [(896, 104)]


def test_a_twin_waits_and_shares(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="load")
    store.opened.clear()
    store.gate.clear()
    first, second = engine.add(stored), engine.add(stored)
    engine.until(lambda: len(store.opened) == 2)
    store.gate.set()
    assert engine.finish(first, second) == [plain[1000], plain[1000]]
    assert len(store.opened) == 7


def test_two_at_once(engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]) -> None:
    engine.run(prompt(1500, seed=3))
    engine.settle()
    engine.core.reset_prefix_cache()
    store.gate.clear()
    store.let_through = 3
    requests = [engine.add(prompt(1500, seed=3)), engine.add(stored)]
    engine.until(lambda: len(engine.half.restorations) == 2)
    engine.step(3)
    store.gate.set()
    assert engine.finish(*requests) == [plain[1500], plain[1000]]


def test_other_requests_go_on_while_one_loads(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    engine.set(mode="load")
    store.gate.clear()
    restored = engine.add(stored)
    engine.until(lambda: len(store.opened) >= 2)
    assert engine.run(prompt(300, seed=5)) == plain[300]
    assert engine.restoration(restored).parked
    store.gate.set()
    assert engine.finish(restored) == [plain[1000]]


def test_what_is_generated_is_saved_too(engine: TinyEngine, store: ScriptedStore) -> None:
    answer = engine.run(prompt(120), sampling(20))
    engine.settle()
    assert len(list(store)) == 1
    engine.core.reset_prefix_cache()
    engine.set(mode="load")
    engine.run(prompt(120) + answer)
    engine.settle()
    assert engine.report().loaded_tokens == 128


def test_nothing_is_saved_twice(engine: TinyEngine, store: ScriptedStore, stored: list[int]) -> None:
    writes = store.writes
    engine.run(stored)
    engine.core.reset_prefix_cache()
    engine.run(stored + prompt(30, seed=9))
    engine.settle()
    assert store.writes == writes + 1
