"""What vLLM says of its caches stays true."""

from __future__ import annotations

import pytest
from tiny_engine import ScriptedStore, TinyEngine, prompt


class Counts:
    """Sums up the statistics of all steps."""

    def __init__(self, engine: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.totals = {"local": [0, 0, 0], "external": [0, 0, 0]}
        self.kinds: dict[str, float] = {}
        original = engine.scheduler.make_stats

        def make_stats(*args: object, **kwargs: object) -> object:
            stats = original(*args, **kwargs)
            pairs = {"local": stats.prefix_cache_stats, "external": stats.connector_prefix_cache_stats}
            for name, part in pairs.items():
                found = (part.requests, part.queries, part.hits)
                assert min(found) >= 0, "counters never fall"
                self.totals[name] = [total + count for total, count in zip(self.totals[name], found, strict=True)]
            for name, values in (stats.kv_connector_stats or {}).items():
                for value in values.values():
                    self.kinds[name] = self.kinds.get(name, 0) + (value if not isinstance(value, list) else len(value))
            return stats

        monkeypatch.setattr(engine.scheduler, "make_stats", make_stats)


def test_hits_are_what_was_loaded(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(engine, monkeypatch)
    engine.set(mode="both")
    request = engine.hang(store, stored, loaded=2)
    engine.overtake()
    engine.finish(request)
    store.gate.set()
    engine.settle()
    engine.step(2)
    assert engine.report().loaded_tokens == 256
    assert counts.totals == {"local": [1, 1000, 0], "external": [1, 1000, 256]}
    assert engine.outputs[request].num_cached_tokens == 256
    assert counts.kinds["cakekv:loaded_tokens"] == 256
    assert counts.kinds["cakekv:restores"] == 1


def test_local_hits_are_counted_apart(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.set(mode="compute")
    engine.run(stored[:300])
    engine.settle()
    counts = Counts(engine, monkeypatch)
    engine.set(mode="load")
    request = engine.add(stored)
    engine.finish(request)
    engine.settle()
    engine.step(2)
    assert counts.totals == {"local": [1, 1000, 256], "external": [1, 744, 640]}
    assert engine.outputs[request].num_cached_tokens == 896


def test_a_prompt_that_is_not_stored(engine: TinyEngine, store: ScriptedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(engine, monkeypatch)
    engine.run(prompt(1000))
    engine.settle()
    engine.run(prompt(20))  # what is counted travels with the outputs of a step
    assert counts.totals == {"local": [2, 1020, 0], "external": [2, 1020, 0]}
    assert counts.kinds["cakekv:saved_chunks"] == 7


def test_a_request_may_ask_for_its_report(engine: TinyEngine, stored: list[int]) -> None:
    from tiny_engine import sampling

    wishes = {"kv_transfer_params": {"cakekv": {"mode": "load", "report": True}}}
    request = engine.add(stored, sampling(extra_args=wishes))
    engine.finish(request)
    report = engine.outputs[request].kv_transfer_params["cakekv"]
    assert (report["mode"], report["loaded_tokens"]) == ("load", 896)
