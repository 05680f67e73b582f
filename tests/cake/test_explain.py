"""The plan in words, before anything is done."""

from __future__ import annotations

from pathlib import Path

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.store.memory import MemoryStore

CHUNK = 16


def test_every_position_is_planned_for_and_nothing_is_done(engine: TransformersEngine, prompt: list[int]) -> None:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        store.delete([sorted(chunk.key for chunk in store)[0]])
        runs = cake.explain(prompt, mode="load")
        assert cake.last_report is not None
        assert cake.last_report.loaded_tokens == 0
    assert [run.start for run in runs] == [0, *(run.start + run.tokens for run in runs[:-1])]
    assert sum(run.tokens for run in runs) == len(prompt)
    computed = [run for run in runs if run.how == "compute"]
    assert sum(run.tokens for run in computed) == CHUNK + 5
    assert all(run.why == "not stored" for run in computed)
    assert {run.how for run in runs} == {"compute", "memory"}
    assert "load from memory" in "\n".join(map(str, runs))


def test_what_a_model_costs_is_known_to_the_next_process(
    engine: TransformersEngine, prompt: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "calibration.json"
    with Cake(engine, chunk_tokens=CHUNK, calibration=file) as cake:
        assert not cake.compute_cost.known
        cake.prefill(prompt)
        learned = cake.compute_cost.shape
    again = Cake(engine, chunk_tokens=CHUNK, calibration=file)
    assert again.compute_cost.known
    assert again.compute_cost.shape == learned
    assert not Cake(engine, chunk_tokens=CHUNK, max_span_tokens=64, calibration=file).compute_cost.known
