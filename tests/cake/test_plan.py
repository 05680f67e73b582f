"""What a `Cake` is made with: options, and what is known before; and the plan in words."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.options import AnswerKeywords, AnswerOptions, CakeKeywords, CakeOptions
from cakekv.store.memory import MemoryStore

CHUNK = 16


def test_every_position_is_planned_for_and_nothing_is_done(engine: TransformersEngine, prompt: list[int]) -> None:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        store.delete([sorted(chunk.key for chunk in store)[0]])
        runs = cake.plan(prompt, mode="load")
        assert cake.last_report is not None
        assert cake.last_report.loaded_tokens == 0
        with pytest.warns(DeprecationWarning, match=r"Cake\.plan"):
            assert [run.how for run in cake.explain(prompt, mode="load")] == [run.how for run in runs]
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


def test_what_a_tier_costs_is_known_to_the_next_process(
    engine: TransformersEngine, prompt: list[int], tmp_path: Path
) -> None:
    file, url = tmp_path / "calibration.json", f"file://{tmp_path}/kv"
    with Cake(engine, store=[url, MemoryStore()], chunk_tokens=CHUNK, calibration=file) as cake:
        assert not cake.load_costs[0].known
        cake.prefill(prompt)
        cake.wait_saved()
        cake.prefill(prompt, mode="load")
        learned = cake.load_costs[0].figures
    again = Cake(engine, store=[MemoryStore(), f"{url}?capacity=1GB"], chunk_tokens=CHUNK, calibration=file)
    assert not again.load_costs[0].known, "whose store that was is not known"
    assert again.load_costs[1].figures.byte_s == pytest.approx(learned.byte_s)
    assert again.load_costs[1].figures.load_s == pytest.approx(learned.load_s)
    assert not again.load_costs[1].measured
    assert not Cake(engine, store=f"{url}?bandwidth=1MB/s", chunk_tokens=CHUNK, calibration=file).load_costs[0].known
    again.close()
    assert not Cake(engine, store=url, chunk_tokens=32, calibration=file).load_costs[0].known, "of another size"
    restored = Cake(engine, store=url, chunk_tokens=CHUNK, calibration=file).prefill(prompt, save=False)
    assert restored.report.computed_tokens + restored.report.loaded_tokens == len(prompt)
    assert str(tmp_path) not in file.read_text()


def test_every_way_to_make_a_cake_takes_every_option() -> None:
    parameters = inspect.signature(Cake.__init__).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == set(CakeKeywords.__annotations__) == {field.name for field in fields(CakeOptions)}
    assert inspect.signature(Cake.from_pretrained).parameters["options"].kind is inspect.Parameter.VAR_KEYWORD


def test_every_way_to_answer_takes_every_option() -> None:
    for method in (Cake.generate, Cake.stream, Cake.agenerate, Cake.astream):
        assert inspect.signature(method).parameters["options"].annotation == "Unpack[AnswerKeywords]"
    assert set(AnswerKeywords.__annotations__) == {field.name for field in fields(AnswerOptions)}


def test_options_stay_as_they_are_and_keep_a_secret(engine: TransformersEngine) -> None:
    options = Cake(engine, tenant="hunter2", codec="int8").options
    assert "hunter2" not in repr(options)
    with pytest.raises(FrozenInstanceError):
        options.tenant = ""  # type: ignore[misc]


def test_an_unknown_policy_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(BadInput, match="marginal_saving"):
        Cake(engine, policy="best")
