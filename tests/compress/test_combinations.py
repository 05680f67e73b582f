"""Whatever a method is given with (parameters, codecs, other options): it is refused at once, or does what it says."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.codec import CODECS
from cakekv.compress import METHODS, method_named, methods_named
from cakekv.compress.base import Layer, Method
from cakekv.compress.sink_recent import SinkRecent
from cakekv.decode import SIGHTS
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.reuse import WAYS
from cakekv.store.memory import MemoryStore
from tests.matrix.models import build

CHUNK, CHUNKS = 32, 3
PROMPT = [(7 * place * place + 3 * place) % 120 + 3 for place in range(CHUNK * CHUNKS + 5)]
AT_STORE = {
    "key_norm": "key_norm",
    "kvmerger": "kvmerger:share=0.5,first_layers=0,last_layers=0,when=store",
    "elastic_cache": "elastic_cache:share=0.5,when=store",
}
OTHERS: dict[str, dict[str, Any]] = {
    "key_norm": {"share": 0.25},
    "kvmerger": {
        **{"epsilon": 0.99, "share": 0.25, "recent": 0.4, "heavy": 0.5, "rows": 5, "sigma": 2.0},
        **{"values": "weighted", "first_layers": 2, "last_layers": 2, "merging": False},
    },
    "elastic_cache": {"share": 0.25, "rows": 5, "merging": "values", "answering": "oldest", "distance": 3},
}
"""Of each parameter, another value."""


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama"))


def test_these_are_all_that_act_at_store() -> None:
    assert AT_STORE.keys() == {name for name in METHODS if "store" in method_named(name).times}
    for name, others in OTHERS.items():
        assert others.keys() == {field.name for field in fields(method_named(name))} - {"when"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("key_norm", {"codec": name}) for name in CODECS if name not in ("kivi", "think")),
        *(("key_norm", {"codec": f"{name}:window=0"}) for name in ("kivi", "think")),
        *(("key_norm", {"reuse": name}) for name in WAYS),
        *((name, {"codec": codec}) for name in ("kvmerger", "elastic_cache") for codec in ("raw", "int8", "int4")),
    ],
)
def test_chunks_are_stored_smaller_or_that_is_refused(
    engine: TransformersEngine, name: str, options: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"compress": AT_STORE[name], "chunk_tokens": CHUNK, "max_span_tokens": CHUNK, **options}
    refusal = ""
    try:
        cake = Cake(engine, None, MemoryStore(), **common)
    except BadInput as error:
        refusal = str(error)
    if refusal:
        assert "compress" in refusal
        assert "give" in refusal
        assert options not in ({"codec": "raw"}, {"codec": "int8"}, {"codec": "int4"}, {"reuse": "epic"})
        return
    with cake:
        cake.prefill(PROMPT)
        saved = cake.wait_saved()
        assert (saved.saved_chunks, saved.error) == (CHUNKS, None)
        report = cake.prefill(PROMPT, mode="load").report
    assert report.loaded_tokens == CHUNK * CHUNKS
    assert report.kept_share < 0.9


@pytest.mark.parametrize("sight", sorted(SIGHTS.keys() - {"less"}))  # which needs weights of the model's own
@pytest.mark.parametrize("name", METHODS)
def test_no_method_goes_with_a_sight(engine: TransformersEngine, name: str, sight: str) -> None:
    with pytest.raises(BadInput, match="needs a cache that has everything"):
        Cake(engine, compress=AT_STORE.get(name, name), decode=sight)


def left(method: Method) -> list[torch.Tensor]:
    """What a method leaves of a chunk, of three layers."""
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn((2, 40, 8), generator=generator).cumsum(1) for _ in range(2))
    positions = torch.arange(40).expand(2, -1)
    layers = [Layer(index, 3, keys, values, positions, 40) for index in range(3)]
    found = []
    for layer, kept in zip(layers, method.keep(layers), strict=True):
        merged = None if kept is None else method.merge(layer, kept)
        rows = (keys, values) if merged is None else (merged.keys, merged.values)
        found += [keys.new_zeros(()) if kept is None else kept, *(one if kept is None else one[kept] for one in rows)]
    return found


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, others in OTHERS.items() for field in others])
def test_no_parameter_is_ignored_at_store(name: str, field: str) -> None:
    method = method_named(AT_STORE[name])
    if field == "epsilon":  # which is for those that give no share
        method = method_named("kvmerger:first_layers=0,last_layers=0,when=store")
    if field in ("recent", "rows", "answering", "distance"):
        with pytest.raises(BadInput, match=f"nothing comes of {field} with when=store"):
            replace(method, **{field: OTHERS[name][field]})
        return
    other = replace(method, **{field: OTHERS[name][field]})
    one, two = left(method), left(other)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("kvmerger:values=biased,when=store", "values is biased, but must be scaled or weighted with when=store"),
        ("kvmerger:recent=0.1,rows=8,when=store", "nothing comes of recent and rows with when=store"),
        ("elastic_cache:answering=oldest,when=store", "nothing comes of answering with when=store"),
        ("cascading:last_rows=64,prefill=stride", "last_rows is 64, but must be 0 with prefill=stride"),
    ],
)
def test_refused(recipe: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        method_named(recipe)


class OnSteps(SinkRecent):
    """Acts at no other time than a prefill's method does not."""

    @property
    def at(self) -> frozenset[str]:
        return frozenset({"decode"})


def test_one_method_acts_on_a_prompt_and_its_answer() -> None:
    with pytest.raises(BadInput, match="heavy_hitter and sink_recent cannot be combined"):
        methods_named(["heavy_hitter", OnSteps()])
    assert len(methods_named("key_norm+corm")) == 2
