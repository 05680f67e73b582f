"""What a user tells torch to do by default changes nothing of what methods keep, and of what sights see."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from cakekv.cake import Cake
from cakekv.compress import METHODS
from cakekv.decode import SIGHTS
from cakekv.engine.transformers import TransformersEngine
from cakekv.store.memory import MemoryStore
from tests.matrix.models import build
from tests.threads import single_thread

PROMPT = random.Random(5).choices(range(3, 128), k=125)
COMPRESS = {
    "corm": "corm:window=8,recent=8",
    "cascading": "cascading:size=32,cascades=2,sinks=4,stride_tokens=16",
    "dbudgetkv": "dbudgetkv:min_recent=0,threshold=0.3",
}
DECODE = {
    "clusterkv": "clusterkv:budget=24,sinks=4,tokens=4,span=32,lazy=yes",
    "pages": "pages:budget=24,sinks=4,tokens=4",
    "quantspec": "quantspec:group=4,recent=8,gamma=3",
}
WAYS = [
    *(("compress", COMPRESS.get(name, name)) for name in METHODS),
    ("compress", "elastic_cache:when=store"),
    ("compress", "kvmerger:values=biased,first_layers=0"),
    *(("decode", DECODE.get(name, name)) for name in SIGHTS if name != "less"),  # it has to learn a model
]


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    with single_thread():
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    engine = TransformersEngine(build("llama"))
    engine.stop_tokens = frozenset()
    return engine


def answers(engine: TransformersEngine, way: str, recipe: str) -> list[list[int]]:
    """Of a prompt that is computed, and of one that is loaded, or recalled."""
    with Cake(engine, None, MemoryStore(), chunk_tokens=8, max_span_tokens=32, **{way: recipe}) as cake:  # type: ignore[arg-type]
        computed = cake.generate(PROMPT, max_new_tokens=12).token_ids
        assert cake.wait_saved().error is None
        return [computed, cake.generate(PROMPT, max_new_tokens=12, mode="load").token_ids]


@pytest.mark.parametrize(("way", "recipe"), WAYS)
def test_defaults(engine: TransformersEngine, way: str, recipe: str) -> None:
    expected = answers(engine, way, recipe)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        assert answers(engine, way, recipe) == expected
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")  # what is made without a device would hold nothing
    assert answers(engine, way, recipe) == expected


@pytest.mark.parametrize(("way", "recipe"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(engine: TransformersEngine, way: str, recipe: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        first = answers(engine, way, recipe)
    assert first[0] == first[1]  # nothing is saved: autocast has no name
    assert len(first[0]) == 12
