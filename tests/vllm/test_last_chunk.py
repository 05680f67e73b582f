"""Prompts that end where a chunk ends: the last chunk is loaded, too, and the last token is computed over it."""

from __future__ import annotations

import pytest
from tiny_engine import BLOCK, ScriptedStore, TinyEngine, sampling

CHUNKS = 7


def computed(engine: TinyEngine, ids: list[int]) -> list[int]:
    """What the engine answers if it computes everything; all of it is stored, and nothing is at hand, afterwards."""
    engine.set(mode="compute")
    answer = engine.run(ids)
    engine.settle()
    assert engine.core.reset_prefix_cache()
    engine.set(mode="load")
    return answer


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_only_the_last_token_is_computed(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]], more: int
) -> None:
    ids = stored[: CHUNKS * BLOCK + more]
    expected = computed(engine, ids)
    writes, loaded = store.writes, (CHUNKS - 1) * BLOCK if more < 0 else CHUNKS * BLOCK - (more == 0)
    request = engine.add(ids)
    assert engine.finish(request) == [expected]
    engine.settle()
    report = engine.report()
    assert (report.computed_tokens, report.loaded_tokens, report.prefix_tokens) == (len(ids) - loaded, loaded, loaded)
    assert [(span.start, span.tokens) for span in report.spans] == [(loaded, len(ids) - loaded)]
    assert engine.outputs[request].num_cached_tokens == loaded
    # Asked again, vLLM has it all but for the last block of whole ones, which it shares only with longer prompts.
    request = engine.add(ids)
    assert engine.finish(request) == [expected]
    assert engine.outputs[request].num_cached_tokens == loaded
    assert engine.run(stored) == plain[1000]
    engine.settle()
    assert store.writes == writes, "nothing is saved twice"


def test_from_both_ends(engine: TinyEngine, store: ScriptedStore, stored: list[int]) -> None:
    ids = stored[: CHUNKS * BLOCK]
    expected = computed(engine, ids)
    engine.set(mode="both")
    request = engine.hang(store, ids, loaded=2)
    engine.overtake()
    assert engine.finish(request) == [expected]
    report = engine.report()
    assert (report.computed_tokens, report.loaded_tokens, report.met_at) == (5 * BLOCK + 1, 2 * BLOCK - 1, 5 * BLOCK)


def test_the_last_chunk_cannot_be_had(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    """It is computed with its last token in one go, and saved again once."""
    ids = stored[: CHUNKS * BLOCK]
    expected = computed(engine, ids)
    engine.loads_first = True
    request = engine.add(ids)
    last = engine.shard_keys(request)[CHUNKS - 1]
    store.damage(last)
    writes = store.writes
    assert engine.finish(request) == [expected]
    engine.settle()
    report = engine.report()
    assert (report.loaded_tokens, report.recomputed_tokens) == ((CHUNKS - 1) * BLOCK, BLOCK - 1)
    assert [(span.start, span.tokens) for span in report.spans] == [((CHUNKS - 1) * BLOCK, BLOCK)]
    assert store.writes == writes + 1
    assert engine.core.reset_prefix_cache()
    assert engine.run(stored) == plain[1000]
    assert engine.report().loaded_tokens == CHUNKS * BLOCK


def test_twins(engine: TinyEngine, store: ScriptedStore, stored: list[int]) -> None:
    """The second waits until vLLM can share what the first restores, and loads the last chunk itself."""
    ids = stored[: CHUNKS * BLOCK]
    expected = computed(engine, ids)
    store.opened.clear()
    store.gate.clear()
    first, second = engine.add(ids), engine.add(ids, sampling(3))
    engine.until(lambda: len(store.opened) == 2)
    store.gate.set()
    assert engine.finish(first, second) == [expected, expected[:3]]
    assert len(store.opened) == CHUNKS + 1
