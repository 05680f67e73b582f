"""An engine that is shut down in mid-load ends soon, writes nothing any more and leaves no thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tiny_engine import ScriptedStore, TinyEngine, prompt, scripted

import cakekv.vllm.working.half as worker_half

LAST_WRITES_S = 0.5
"""Instead of ten."""


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("cakekv")}


@pytest.fixture
def stores() -> list[ScriptedStore]:
    """Two that answer and hold nothing."""
    stores = [scripted("closed"), scripted("closed-too")]
    for store in stores:
        store.recover_now()
        store.empty()
    return stores


@pytest.fixture
def before() -> set[threading.Thread]:
    """The threads before there is an engine."""
    return our_threads()


@pytest.fixture
def engine(
    model: Path, plain: dict[int, list[int]], stores: list[ScriptedStore], before: set[threading.Thread]
) -> Iterator[TinyEngine]:
    """It computes nothing that is stored, since that would race with the loads for the chunks."""
    with closing(
        TinyEngine(model, {"store": ["scripted://closed", "scripted://closed-too"], "mode": "load"})
    ) as engine:
        yield engine


@pytest.mark.parametrize("hanging", ["loads", "writes"])
def test_shutdown(
    engine: TinyEngine,
    plain: dict[int, list[int]],
    stores: list[ScriptedStore],
    before: set[threading.Thread],
    hanging: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loads: one store hangs, the other goes on when the engine is about to end, and a look-up hangs, too."""
    monkeypatch.setattr(worker_half, "LAST_WRITES_S", LAST_WRITES_S)
    assert engine.run(prompt(1000)) == plain[1000]
    engine.settle()
    engine.core.reset_prefix_cache()
    layers = engine.kv_caches()
    if hanging == "writes":
        stores[0].takes.clear()
        engine.run(prompt(1500, seed=3))
        engine.until(lambda: engine.worker.saves.pending)
    else:
        for store in stores:
            store.opened.clear()
            store.gate.clear()
            store.let_through = 1
        request = engine.add(prompt(1000))
        engine.until(lambda: engine.restoration(request) and all(len(store.opened) > 2 for store in stores))
        stores[0].answers.clear()
        engine.add(prompt(1500, seed=3))
        engine.step()
        threading.Timer(0.01, stores[1].gate.set).start()
    assert our_threads() - before
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < LAST_WRITES_S + 10.0
    left = [layer.clone() for layer in layers]
    for store in stores:
        store.recover_now()
    deadline = time.monotonic() + 20.0
    while our_threads() - before:
        assert time.monotonic() < deadline, our_threads() - before
        time.sleep(0.02)
    assert all(bool((layer == was).all()) for layer, was in zip(layers, left, strict=True)), (
        "somebody wrote after the end"
    )
