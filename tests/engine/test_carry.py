"""Requests compute in threads of the Cake's own; what torch keeps per thread goes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import build


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama"))


def seen(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, look: Any) -> Any:
    """What `look` returns where a prompt is computed."""
    found = []
    compute = engine.compute

    def watched(*arguments: Any) -> Any:
        found.append(look())
        return compute(*arguments)

    with monkeypatch.context() as patch, Cake(engine, chunk_tokens=8, max_span_tokens=16) as cake:
        patch.setattr(engine, "compute", watched)
        cake.prefill([5, 6, 7])
    return found[0]


def test_autocast(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    assert not seen(engine, monkeypatch, look)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert seen(engine, monkeypatch, look) == (True, torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert seen(engine, monkeypatch, look) == (True, torch.float16)
    assert not seen(engine, monkeypatch, look)[0]


def test_the_number_of_threads(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            assert seen(engine, monkeypatch, torch.get_num_threads) == threads
    finally:
        torch.set_num_threads(before)
