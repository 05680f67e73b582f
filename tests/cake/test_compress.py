"""A `Cake` that keeps fewer tokens: however its prompt was restored, what it tells, and what it never saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cakekv.cake import Cake
from cakekv.compress.base import Method
from cakekv.compress.sink_recent import SinkRecent
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.restore.options import Mode
from cakekv.store.memory import MemoryStore
from tests.cake.conftest import CHUNK
from tests.matrix.models import build


def cake_of(engine: TransformersEngine, store: object = None, **options: object) -> Cake:
    return Cake(engine, None, store, chunk_tokens=CHUNK, max_span_tokens=CHUNK, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["heavy_hitter:share=0.4,rows=16", "sink_recent:recent=40"])
def test_the_choice_does_not_depend_on_the_restore(engine: TransformersEngine, prompt: list[int], recipe: str) -> None:
    """Computed, loaded or both: the same entries are kept, and the same is answered."""
    answers, shares = [], []
    with MemoryStore() as store:
        with cake_of(engine, store) as plain:
            plain.prefill(prompt)
            plain.wait_saved()
        modes: list[Mode] = ["compute", "load", "both"]
        for mode in modes:
            with cake_of(engine, store, compress=recipe) as cake:
                answer = cake.generate(prompt, mode=mode, max_new_tokens=12)
            answers.append(answer.token_ids)
            shares.append(answer.report.kept_share)
            assert answer.report.compress.startswith(recipe.partition(":")[0])
            assert 0 < answer.report.cache_bytes < engine.held_bytes(engine.new_cache(len(prompt)))
    assert answers[0] == answers[1] == answers[2]
    assert shares[0] == shares[1] == shares[2] < 0.45


def test_answers_are_not_saved(engine: TransformersEngine, prompt: list[int]) -> None:
    """What attends to fewer tokens is not what the model says; the prompt is saved as ever, and exactly."""
    with MemoryStore() as store:
        with cake_of(engine, store, compress="sink_recent:share=0.3") as cake:
            cake.generate(prompt, max_new_tokens=3 * CHUNK)
            saved = cake.wait_saved()
        assert saved.saved_chunks == len(prompt) // CHUNK
        with cake_of(engine, store) as plain:
            loaded = plain.prefill(prompt, mode="load")
        with cake_of(engine) as fresh:
            expected = fresh.prefill(prompt)
    assert loaded.report.loaded_tokens == len(prompt) // CHUNK * CHUNK
    torch.testing.assert_close(loaded.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_keeping_all_is_ordinary(engine: TransformersEngine, prompt: list[int]) -> None:
    with cake_of(engine) as plain, cake_of(engine, compress="heavy_hitter:share=1") as cake:
        one, other = (each.generate(prompt, max_new_tokens=20) for each in (plain, cake))
    assert one.token_ids == other.token_ids
    assert other.report.kept_share == 1.0


def test_several_ways_to_say_it(engine: TransformersEngine, prompt: list[int]) -> None:
    """A name, an object, a list of either."""
    given: list[str | Method | list[str | Method]] = ["sink_recent", SinkRecent(), ["sink_recent"], [SinkRecent()]]
    answers = []
    for compress in given:
        with cake_of(engine, compress=compress) as cake:
            answers.append(cake.generate(prompt, max_new_tokens=5).token_ids)
    assert all(answer == answers[0] for answer in answers)


def test_a_sight_of_everything(engine: TransformersEngine, prompt: list[int]) -> None:
    with cake_of(engine) as plain, cake_of(engine, decode="whole") as cake:
        one, other = (each.generate(prompt, max_new_tokens=20) for each in (plain, cake))
    assert one.token_ids == other.token_ids
    assert other.report.decode == "whole"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compress": "nothing"}, "unknown method to keep fewer tokens 'nothing': choose one of sink_recent"),
        ({"compress": "sink_recent:shares=1"}, "no parameter 'shares=1': it takes sinks="),
        ({"compress": "sink_recent:share=0.1,share=0.2"}, "sink_recent: share is given twice"),
        ({"compress": "sink_recent:share=2"}, "share is 2.0, but must be above 0, up to 1"),
        ({"compress": "sink_recent+heavy_hitter"}, "sink_recent and heavy_hitter cannot be combined"),
        ({"compress": "key_norm+cascading"}, "cascading moves tokens up, and needs a cache that has everything"),
        ({"compress": [3]}, "compress holds 3"),
        ({"compress": 3}, "compress must be a name"),
        ({"decode": "nothing"}, "unknown way to decode 'nothing': choose one of "),
        ({"decode": "whole", "compress": "sink_recent"}, "decode whole needs a cache that has everything"),
    ],
)
def test_refused(engine: TransformersEngine, options: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        cake_of(engine, **options)


def test_a_model_that_cannot(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"compress sink_recent does not work with this model: .*Give no compress"):
        cake_of(TransformersEngine(build("bloom")), compress="sink_recent")


def test_the_cache_that_a_prefill_hands_out(engine: TransformersEngine, prompt: list[int]) -> None:
    """It goes on in `compute`; transformers' own cache cannot have holes."""
    with cake_of(engine, compress="sink_recent:share=0.5") as cake:
        prefill = cake.prefill(prompt, room=8)
        answer = cake.generate(prompt, max_new_tokens=4)
    logits, tokens = prefill.logits, []
    for place in range(4):
        tokens.append(int(logits.argmax()))
        logits = engine.compute(prefill.cache, tokens[-1:], len(prompt) + place)
    assert tokens == answer.token_ids
    with pytest.raises(BadInput, match="holes"):
        prefill.dynamic_cache()
