"""Chunks decoded where the model is: whole restores on what serves CUDA, by a stand-in for its stream without a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.chunk import is_packed
from cakekv.codec import CODECS, codec_named
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.on_device import DeviceDecoder
from cakekv.engine.transfer import transfer_for
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import ChunkFault, CorruptChunk
from cakekv.load import pieces as cutting
from cakekv.store.base import Store
from cakekv.store.memory import MemoryStore
from cakekv.store.packed import Pack, PackedStore
from tests.engine.decoding import Decoding, OnCores
from tests.threads import single_thread

CHUNK = 32
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
RECIPES = [name for name in CODECS if codec_named(name).on_device]
RECIPES += ["kivi:bits=3,window=0", "ladder:window=0", "ladder:read=2", "two_plane:read=upper"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest, device: str, make_engine: Callable[[str], TransformersEngine]) -> Any:
    return make_engine(request.param).model.to(device)


@pytest.fixture
def small(device: str, make_engine: Callable[[str], TransformersEngine]) -> Any:
    return make_engine("float32").model.to(device)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """10 full chunks and a suffix of 5 tokens."""
    rng = random.Random(3)
    return [rng.randrange(211) for _ in range(10 * CHUNK + 5)]


def cake(engine: TransformersEngine, store: Store, codec: str, **options: Any) -> Cake:
    return Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, codec=codec, **options)


def same_caches(one: Any, other: Any, tokens: int) -> bool:
    layers = zip(one.stored, other.stored, strict=True)
    pairs = [pair for two in layers for pair in zip(*(layer.regions for layer in two), strict=True)]
    return all(torch.equal(first[:, :tokens], second[:, :tokens]) for first, second in pairs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_restore_is_the_same_wherever_it_is_decoded(model: Any, prompt: list[int], recipe: str) -> None:
    store = MemoryStore()
    with cake(OnCores(model), store, recipe) as one:
        one.prefill(prompt)
        one.wait_saved()
        on_cores = one.prefill(prompt, mode="load", save=False)
        expected = one.generate(prompt, max_new_tokens=8, mode="load", save=False).token_ids
    engine = Decoding(model)
    with cake(engine, store, recipe) as other:
        found = other.prefill(prompt, mode="load", save=False)
        assert (found.report.loaded_tokens, found.report.lossy_tokens) == (
            on_cores.report.loaded_tokens,
            on_cores.report.lossy_tokens,
        )
        layers = len(engine.layout.layers)
        assert len(engine.decoded) == layers * found.report.lossy_tokens // CHUNK > 0
        assert same_caches(found.cache, on_cores.cache, 10 * CHUNK)
        assert torch.equal(found.logits, on_cores.logits)
        assert other.generate(prompt, max_new_tokens=8, mode="load", save=False).token_ids == expected


@pytest.mark.parametrize("recipe", ["raw", "kivi:bits=4"])
def test_packed_chunks_are_unpacked_by_cores(small: Any, prompt: list[int], recipe: str) -> None:
    """Also those beside codes that the device decodes."""
    store, plain = PackedStore(MemoryStore(), Pack.YES), MemoryStore()
    for place in (store, plain):
        with cake(OnCores(small), place, recipe) as one:
            one.prefill(prompt)
            one.wait_saved()
            expected = one.prefill(prompt, mode="load", save=False)
    assert any(is_packed(chunk.size) for chunk in store)
    engine = Decoding(small)
    with cake(engine, store, recipe) as other:
        found = other.prefill(prompt, mode="load", save=False)
    assert found.report.loaded_tokens == 10 * CHUNK
    assert len(engine.decoded) == len(engine.layout.layers) * found.report.lossy_tokens // CHUNK
    assert same_caches(found.cache, expected.cache, 10 * CHUNK)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("recipe", ["raw", "nuq3", "think", "cachegen"])
def test_what_only_cores_decode_goes_through_them(small: Any, prompt: list[int], recipe: str) -> None:
    store, engine = MemoryStore(), Decoding(small)
    with cake(OnCores(small), store, recipe) as one:
        one.prefill(prompt)
        one.wait_saved()
        expected = one.prefill(prompt, mode="load", save=False)
    with cake(engine, store, recipe) as other:
        assert torch.equal(other.prefill(prompt, mode="load", save=False).logits, expected.logits)
    assert not engine.decoded


def test_the_cpus_own_caches_are_decoded_by_its_cores(make_engine: Callable[[str], TransformersEngine]) -> None:
    engine = make_engine("float32")
    coder = ChunkCoder(codec_named("int8"), engine.layout, CHUNK, "float32")
    assert coder.decodes_on_device
    assert transfer_for(torch.device("cpu")).decoder(coder) is None


class Late(MemoryStore):
    """40 ms before a chunk is open."""

    def open(self, key: Any) -> Any:
        sleep(0.04)
        return super().open(key)


def test_pieces_are_decoded_as_they_come(small: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The layered finish: some layers of a chunk at a time."""
    monkeypatch.setattr(cutting, "_LEAST_READ_BYTES", 1)

    class Paced(Decoding):
        def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
            sleep(0.002 * len(token_ids))
            return super().compute(cache, token_ids, start, gate)

    end = 10 * CHUNK
    long = prompt[:end] + [3, 1, 4, 1, 5, 9, 2, 6] * 20
    store = Late()
    with cake(OnCores(small), store, "int8") as one:
        one.prefill(prompt)
        one.wait_saved()
        decoded = one.prefill(prompt, mode="load", save=False)
    with cake(Paced(small), store, "int8") as other:
        for _ in range(40):  # until one was finished in layers: the first teaches what both arms cost
            mixed = other.prefill(long, mode="both", save=False)
            loaded = torch.ones(end, dtype=torch.bool)
            for span in mixed.report.spans:
                loaded[span.start : span.start + span.tokens] = False
            for layer, back in zip(mixed.cache.stored, decoded.cache.stored, strict=True):
                for mine, theirs in zip(layer.regions, back.regions, strict=True):
                    assert torch.equal(mine[:, :end][:, loaded], theirs[:, :end][:, loaded])
            if any(load.group is not None for load in mixed.report.loads):
                return
    pytest.fail("none was finished in layers")


def test_a_load_lasts_until_it_is_decoded(small: Any, prompt: list[int]) -> None:
    """The planner learns what loads cost from when they ended: a device that is busy for long must show in it."""
    store, busy_s = MemoryStore(), 0.05
    with cake(OnCores(small), store, "int8") as one:
        one.prefill(prompt)
        one.wait_saved()

    class Behind(Decoding):
        """Whoever waits for its stream waits long."""

        def decoder(self, coder: ChunkCoder) -> DeviceDecoder:
            @contextmanager
            def beside() -> Iterator[None]:
                with self._transfer._beside():  # type: ignore[attr-defined]
                    yield
                    sleep(busy_s)

            return DeviceDecoder(coder, self.device, beside)

    with cake(Behind(small), store, "int8") as other:
        report = other.prefill(prompt, mode="load", save=False).report
        assert len(report.loads) == 10
        assert all(load.ended_s - load.began_s >= busy_s for load in report.loads)
        assert other.load_costs[0].duration(report.loads[0].bytes) >= busy_s


def test_codes_that_are_wrong_are_computed(small: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device's decoder refuses is recomputed, and so is what does not pass its checksum."""
    store, engine = MemoryStore(), Decoding(small)
    with cake(engine, store, "int8") as one:
        full = one.prefill(prompt)
        one.wait_saved()
        sent = DeviceDecoder._sent

        def refusing(self: DeviceDecoder, batch: list[int], verified: Any) -> list[torch.Tensor]:
            sent(self, batch, verified)
            raise CorruptChunk(ChunkFault.UNDECODABLE, "layer 0: refused")

        with monkeypatch.context() as patch:
            patch.setattr(DeviceDecoder, "_sent", refusing)
            refused = one.prefill(prompt, mode="load", save=False)
        assert refused.report.loaded_tokens == 0
        assert any("undecodable" in reason for reason in refused.report.miss_reasons())
        assert torch.allclose(refused.logits, full.logits, atol=1e-4)
        for chunk in list(store):
            with store.open(chunk.key) as reader:
                data = bytearray(reader.size)
                reader.read_into(memoryview(data), 0)
            data[5000] ^= 4
            store.write(chunk.key, memoryview(data))
        damaged = one.prefill(prompt, mode="load", save=False)
        assert damaged.report.loaded_tokens == 0
        assert any(reason.startswith("corrupt: segment") for reason in damaged.report.miss_reasons())
        assert torch.allclose(damaged.logits, full.logits, atol=1e-4)
