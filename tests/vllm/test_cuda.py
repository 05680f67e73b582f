"""The plug-in on a GPU, where there is one. The project has none: nobody has seen these tests pass so far."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_codecs import CHUNKS, coded_engine, test_loaded_blocks_are_the_decoded_ones_bit_for_bit
from test_restoring import test_loaded_blocks_hold_the_stored_bytes, test_throwing_loads_away_changes_the_output
from tiny_engine import ScriptedStore, TinyEngine, prompt

from cakekv.codec import codec_named

__all__ = [
    "test_loaded_blocks_are_the_decoded_ones_bit_for_bit",
    "test_loaded_blocks_hold_the_stored_bytes",
    "test_throwing_loads_away_changes_the_output",
]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")

ON_GPU = {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.2}
"""The one backend that computes in float32: with less, which token is likeliest may depend on the shapes of steps."""


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[dict[int, list[int]]]:
    """As conftest's, on the GPU."""
    engine = TinyEngine(model, **ON_GPU)
    yield {1000: engine.run(prompt(1000))}
    engine.close()


@pytest.fixture(scope="module", params=["synchronous", "asynchronous"])
def shared_engine(request: pytest.FixtureRequest, model: Path, plain: dict[int, list[int]]) -> Iterator[TinyEngine]:
    """As conftest's, on the GPU."""
    options = {"store": "scripted://main", "mode": "both", "load_deadline": 20.0}
    scheduling = {
        "async_scheduling": request.param == "asynchronous",
        "scheduler_cls": f"cakekv.vllm.Cake{'Async' if request.param == 'asynchronous' else ''}Scheduler",
    }
    engine = TinyEngine(model, options, **ON_GPU, **scheduling)
    assert type(engine.worker.shards[0].cache).__name__ == "CudaPagedCache"
    yield engine
    engine.close()


@pytest.mark.parametrize("mode", ["load", "both"])
def test_modes(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]], mode: str
) -> None:
    engine.set(mode=mode)
    assert engine.run(stored) == plain[1000]
    engine.settle()
    assert engine.report().loaded_tokens > 0


def test_a_claim_overtakes_loads(
    engine: TinyEngine, store: ScriptedStore, stored: list[int], plain: dict[int, list[int]]
) -> None:
    store.gate.clear()
    store.let_through = 2
    request = engine.add(stored)
    engine.until(lambda: engine.restoration(request) and len(store.opened) == 4)
    assert engine.finish(request) == [plain[1000]]


@pytest.fixture(
    scope="module", params=["int8", "fp8", "two_plane", "ladder", "kivi:bits=3,window=0", "cachegen:level=1"]
)
def coded(request: pytest.FixtureRequest, model: Path, plain: dict[int, list[int]]) -> Iterator[TinyEngine]:
    """As test_codecs's, on the GPU, which decodes all but the last."""
    codec = codec_named(request.param)
    with coded_engine(request.param, CHUNKS - (codec.window > 0), model, plain, **ON_GPU) as engine:
        assert (engine.worker.shards[0].decoder is not None) == codec.on_device
        yield engine
