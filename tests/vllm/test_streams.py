"""The CUDA path's order of copies, waits and steps, by streams that are as late as they may be. No GPU is involved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lazy_streams import LazyDevice
from test_codecs import CHUNKS, blocks_of, emptied, recoded
from tiny_engine import BLOCK, ScriptedStore, TinyEngine, prompt, sampling, scripted

import cakekv.vllm.working.paged_cache.cuda as cuda
import cakekv.vllm.working.shard as shard
from cakekv.codec import codec_named
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.on_device import DeviceDecoder
from cakekv.keys import ChunkKey
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from cakekv.vllm.messages import LoadOrder, StepOrders
from cakekv.vllm.working.paged_cache import PagedCache, open_paged_cache
from cakekv.vllm.working.paged_cache.cuda import CudaPagedCache
from cakekv.vllm.working.paged_cache.layers import as_blocks
from cakekv.vllm.working.paged_cache.order import BlockOrder

OLD, NEW, STORED = b"\x01" * 8, b"\x02" * 8, b"\x03" * 8


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyDevice]:
    device = LazyDevice()
    monkeypatch.setattr(cuda, "torch", device)
    with device:
        yield device


@pytest.fixture
def layer() -> torch.Tensor:
    """One layer's cache of four blocks."""
    return torch.zeros(4, 8, dtype=torch.uint8)


@pytest.fixture
def cache(device: LazyDevice, layer: torch.Tensor) -> CudaPagedCache:
    cache = CudaPagedCache([layer])
    device.log.clear()
    return cache


def write(device: LazyDevice, layer: torch.Tensor, block: int, content: bytes) -> None:
    """A step writes a block."""
    device.launch(lambda: layer[block].fill_(content[0]))


def loading(*blocks: int) -> StepOrders:
    """A step's orders: load into these blocks."""
    return StepOrders(1, loads=[LoadOrder(0, 0, ChunkKey(bytes(32)), 0, blocks)])


def test_the_calls_of_a_save(device: LazyDevice, cache: CudaPagedCache) -> None:
    cache.gather([0], [memoryview(bytearray(8))])
    assert device.log == [
        ("computing", "record"),
        ("gathering", "wait"),
        ("gathering", "to"),
        ("gathering", "index_select"),
        ("gathering", "copy_"),
        ("gathering", "record"),
    ]


def test_the_calls_of_a_load(device: LazyDevice, cache: CudaPagedCache) -> None:
    cache.begin_step(loading(0))
    cache.place([0], [memoryview(bytearray(STORED))])
    assert device.log == [
        ("computing", "record"),
        ("placing", "wait"),
        ("placing", "to"),
        ("placing", "to"),
        ("placing", "index_copy_"),
        ("placing", "record"),
    ]


def test_a_step_without_saves_and_loads_is_left_alone(device: LazyDevice, cache: CudaPagedCache) -> None:
    cache.begin_step(StepOrders(1, new_blocks=[0, 1]))
    assert device.log == []


def test_staging_is_pinned(device: LazyDevice, cache: CudaPagedCache) -> None:
    assert len(cache.allocate(100)) == 100
    assert device.log == [("computing", "pinned")]


def test_a_save_has_what_the_step_computes(device: LazyDevice, cache: CudaPagedCache, layer: torch.Tensor) -> None:
    write(device, layer, 2, OLD)
    buffer = bytearray(8)
    copied = cache.gather([2], [memoryview(buffer)])
    assert buffer == bytes(8), "nothing is waited for"
    copied()
    assert buffer == OLD


@pytest.mark.parametrize("told", [True, False])
def test_a_step_that_is_given_a_block_waits_until_it_is_saved(
    device: LazyDevice, cache: CudaPagedCache, layer: torch.Tensor, told: bool
) -> None:
    """The control: were it not told that the block is given away, the stand-in would let it overtake the copy."""
    write(device, layer, 2, OLD)
    buffer = bytearray(8)
    copied = cache.gather([2], [memoryview(buffer)])
    cache.begin_step(StepOrders(1, new_blocks=[3, 2] if told else [3]))
    write(device, layer, 2, NEW)
    device.computing.finish()
    copied()
    assert buffer == (OLD if told else NEW)


def test_a_step_that_is_given_other_blocks_does_not_wait(
    device: LazyDevice, cache: CudaPagedCache, layer: torch.Tensor
) -> None:
    buffer = bytearray(8)
    cache.gather([2], [memoryview(buffer)])
    write(device, layer, 2, OLD)
    cache.begin_step(StepOrders(1, new_blocks=[0, 1, 3]))
    assert ("computing", "wait") not in device.log


def test_copies_that_are_through_are_forgotten(device: LazyDevice, cache: CudaPagedCache) -> None:
    cache.gather([2], [memoryview(bytearray(8))])()
    device.log.clear()
    cache.begin_step(StepOrders(1, new_blocks=[2]))
    assert device.log == []
    assert not cache.copies


def test_a_load_into_a_block_that_is_being_saved(
    device: LazyDevice, cache: CudaPagedCache, layer: torch.Tensor
) -> None:
    write(device, layer, 2, OLD)
    buffer = bytearray(8)
    copied = cache.gather([2], [memoryview(buffer)])
    cache.begin_step(loading(2))
    cache.place([2], [memoryview(bytearray(STORED))])
    copied()
    assert (bytes(buffer), layer[2].numpy().tobytes()) == (OLD, STORED)


def test_blocks_that_are_zeroed_at_once(device: LazyDevice, layer: torch.Tensor) -> None:
    """vLLM zeroes before the connector hears of the step."""
    cache = CudaPagedCache([layer], zeroed=True)
    write(device, layer, 2, OLD)
    buffer = bytearray(8)
    copied = cache.gather([2], [memoryview(buffer)])
    write(device, layer, 2, bytes(8))
    device.computing.finish()
    copied()
    assert buffer == OLD


def test_a_load_is_behind_what_still_uses_the_block(
    device: LazyDevice, cache: CudaPagedCache, layer: torch.Tensor
) -> None:
    write(device, layer, 2, OLD)
    cache.begin_step(loading(2))
    cache.place([2], [memoryview(bytearray(STORED))])
    device.computing.finish()
    assert layer[2].numpy().tobytes() == STORED


def test_a_load_is_through_when_place_returns_and_does_not_wait_for_its_own_step(
    device: LazyDevice, cache: CudaPagedCache, layer: torch.Tensor
) -> None:
    cache.begin_step(loading(2))
    write(device, layer, 1, NEW)
    segment = bytearray(STORED)
    cache.place([2], [memoryview(segment)])
    segment[:] = bytes(8)
    assert layer[2].numpy().tobytes() == STORED
    assert not layer[1].any()


def test_a_cache_made_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "torch", LazyDevice())
    with torch.inference_mode():
        layer = torch.zeros(4, 7, dtype=torch.uint8)  # no whole words, of which torch would make a tensor for all uses
    CudaPagedCache([layer]).place([2], [memoryview(bytearray(STORED[:7]))])
    assert layer[2].numpy().tobytes() == STORED[:7]


def test_decoding_is_beside_the_step(device: LazyDevice, cache: CudaPagedCache) -> None:
    """Codes are sent and waited for on the stream that places, and nothing of a step is."""
    layout = KVLayout((LayerLayout((PlaneLayout(2, 16, 4),)),))
    coder = ChunkCoder(codec_named("int8:group=16"), layout, 512, "float32")
    order = BlockOrder([np.arange(2 * 16 * 16, dtype=np.int32).reshape(2, 16, 16)], 4)
    decoder = cache.decoder(coder, [order])
    assert decoder is not None
    device.log.clear()
    device.launch(lambda: pytest.fail("the step is waited for"))
    code = memoryview(bytearray(coder.longest.segment_bytes[0]))
    (blocks,) = decoder.decode([0], lambda layer: [code])
    assert blocks.nbytes == coder.exact.segment_bytes[0]
    assert device.log[0] == ("placing", "copy_")
    assert device.log[-1] == ("placing", "record")
    assert {stream for stream, _ in device.log} == {"placing"}
    assert ("placing", "wait") not in device.log
    device.computing.operations.clear()


def test_only_what_a_device_can_decode_is_decoded_there(device: LazyDevice, cache: CudaPagedCache) -> None:
    layout = KVLayout((LayerLayout((PlaneLayout(2, 16, 4),)),))
    order = BlockOrder([np.arange(2 * 16 * 16, dtype=np.int32).reshape(2, 16, 16)], 4)
    for codec in ("nuq3:rope=after", "think", "cachegen"):
        assert cache.decoder(ChunkCoder(codec_named(codec), layout, 512, "float32"), [order]) is None
    assert cache.decoder(ChunkCoder(codec_named("fp8"), layout, 512, "float32"), [order]) is not None, "the control"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> LazyDevice:
    """The same worker, threads and orders as on a GPU; streams are events only, the work is done at once."""
    device = LazyDevice()
    monkeypatch.setattr(cuda, "torch", device)

    def opened(*arguments: Any) -> PagedCache:
        kv_caches, blocks, *_ = arguments
        known = open_paged_cache(*arguments)
        cache = CudaPagedCache([as_blocks(name, tensor, blocks) for name, tensor in kv_caches.items()])
        cache.layout, cache.segment_of = known.layout, known.segment_of
        return cache

    monkeypatch.setattr(shard, "open_paged_cache", opened)
    return device


@pytest.mark.parametrize(("codec", "coded"), [("int8", CHUNKS), ("ladder", CHUNKS - 1)])
def test_a_whole_engine_that_decodes_on_its_device(
    model: Path,
    plain: dict[int, list[int]],
    at_once: LazyDevice,
    codec: str,
    coded: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies in the blocks is what the CPU's loops make of the same chunks, and answers are the same."""
    decoded: list[int] = []
    plain_decode = DeviceDecoder.decode

    def counted(self: DeviceDecoder, layers: Any, verified: Any) -> list[torch.Tensor]:
        decoded.extend(layers)
        return plain_decode(self, layers, verified)

    answers = []
    for on_device in (True, False):
        store: ScriptedStore = scripted(f"device-{codec}")
        options = {"store": f"scripted://device-{codec}", "codec": codec, "load_deadline": 20.0}
        with monkeypatch.context() as patch:
            patch.setattr(DeviceDecoder, "decode", counted)
            if not on_device:
                patch.setattr(CudaPagedCache, "decoder", lambda self, coder, orders: None)
            with closing(TinyEngine(model, options)) as engine:
                if on_device:
                    one = engine.add(prompt(1000), sampling(2))
                    engine.until(lambda engine=engine, one=one: engine.internal(one).num_computed_tokens >= 1000)
                    computed = blocks_of(engine, one)
                    engine.finish(one)
                engine.settle()
                assert len(list(store)) == CHUNKS
                engine.store = store
                decoded.clear()
                emptied(engine, "load")
                request = engine.add(prompt(1000))
                engine.until(
                    lambda engine=engine, request=request: (
                        engine.restoration(request) and engine.restoration(request).joined
                    )
                )
                found = blocks_of(engine, request)
                for chunk in range(CHUNKS):
                    as_coded = recoded(engine, computed[chunk], chunk * BLOCK)
                    assert found[chunk] == (as_coded if chunk < coded else computed[chunk])
                answers.append(engine.finish(request))
                engine.settle()
                report = engine.report()
                assert report.loaded_tokens == CHUNKS * BLOCK
                assert len(decoded) == (coded * len(found[0]) if on_device else 0)
                engine.assert_nothing_leaked()
    assert answers[0] == answers[1]


def test_a_whole_engine(model: Path, plain: dict[int, list[int]], at_once: LazyDevice) -> None:
    device = at_once
    store: ScriptedStore = scripted("streams")
    with closing(TinyEngine(model, {"store": "scripted://streams", "load_deadline": 20.0})) as engine:
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        assert len(list(store)) == 7
        for mode in ("load", "both"):
            assert engine.core.reset_prefix_cache()
            engine.fill_cache(0)
            engine.set(mode=mode)
            assert engine.run(prompt(1000)) == plain[1000]
            engine.settle()
            assert engine.report().loaded_tokens >= 128
        engine.assert_nothing_leaked()
    assert device.log.count(("gathering", "wait")) == 7
    assert device.log.count(("placing", "wait")) >= 8
