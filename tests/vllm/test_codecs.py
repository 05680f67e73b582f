"""Encoded chunks in a real engine: what lies in the cache afterwards, bit for bit, and what may not be saved.

Tests with an engine of their own come first: there is room for one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_engine import BLOCK, PATIENCE_S, ScriptedStore, TinyEngine, closing, prompt, sampling, scripted

from cakekv.chunk import read_header, segments
from cakekv.keys import ChunkKey

CHUNKS = 7
CODECS = {"int8": CHUNKS, "kivi:bits=4": CHUNKS - 1, "cachegen:level=1": CHUNKS, "nuq3": CHUNKS, "kvtc:bits=4": CHUNKS}
CODECS |= {"kvtc_ladder:bits=6,read=1": CHUNKS}
"""How many of a prompt's seven chunks are stored encoded: the newest 128 tokens of "kivi" are not."""


def blocks_of(engine: TinyEngine, request: str) -> list[list[bytes]]:
    """Per chunk and layer, what lies in the blocks of a request."""
    shard = engine.worker.shards[0]
    block_ids = engine.scheduler.kv_cache_manager.get_block_ids(engine.internal(request).request_id)[0]
    blocks = BLOCK // engine.scheduler.block_size
    found = []
    for chunk in range(CHUNKS):
        buffer = memoryview(bytearray(shard.coder.exact.total_bytes))
        shard.gather(block_ids[chunk * blocks : (chunk + 1) * blocks], buffer)()
        found.append([bytes(part) for part in segments(shard.coder.exact, buffer)])
    return found


def recoded(engine: TinyEngine, blocks: list[bytes], position: int) -> list[bytes]:
    """A chunk's blocks once encoded and decoded."""
    shard = engine.worker.shards[0]
    coder, key = shard.coder, ChunkKey(bytes(32))
    planes, coded, target = (memoryview(bytearray(coder.exact.total_bytes)) for _ in range(3))
    for order, layer, plane in zip(shard.orders, blocks, segments(coder.exact, planes), strict=True):
        order.to_planes(memoryview(bytearray(layer)), plane)
    chunk = coder.encode(planes, coded, key, position)
    assert chunk is not None
    shape = read_header(chunk, len(chunk)).shape
    found = []
    for number, order in enumerate(shard.orders):
        codes = [segments(shape, chunk)[index] for index in coder.segments_of(shape, [number])]
        coder.decode(number, codes, segments(coder.exact, planes)[number], position)
        order.to_blocks(segments(coder.exact, planes)[number], segments(coder.exact, target)[number])
        found.append(bytes(segments(coder.exact, target)[number]))
    return found


def emptied(engine: TinyEngine, mode: str) -> ScriptedStore:
    """The engine's store; nothing is in the cache."""
    engine.settle()
    assert engine.core.reset_prefix_cache()
    engine.fill_cache(0)
    engine.set(mode=mode)
    engine.expect()
    engine.loads_first = False
    engine.store.recover_now()
    return engine.store


def test_layer_by_layer(model: Path, plain: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks long enough to be worth it: pieces are decoded as they come, and the suffix is inexact."""
    ids = prompt(2600)
    options = {"store": "scripted://pieces", "codec": "int8", "chunk_tokens": 512, "layered_finish": True}
    with closing(TinyEngine(model, options)) as engine:
        engine.run(ids)
        engine.store = scripted("pieces")
        emptied(engine, "load")
        expected = engine.run(ids)
        emptied(engine, "auto")
        engine.expect(compute_s=5.12, load_s=0.05)  # so that all is loaded but the suffix
        engine.store.gate.clear()
        wait = engine.worker.loads.wait
        monkeypatch.setattr(engine.worker.loads, "wait", lambda *awaited: engine.store.gate.set() or wait(*awaited))
        assert engine.run(ids) == expected
        engine.settle()
        report = engine.report()
        assert any(load.group is not None for load in report.loads)
        assert report.spans[0].began_s < min(load.ended_s for load in report.loads)
        assert (report.loaded_tokens, report.lossy_tokens, report.after_lossy_tokens) == (2560, 2560, 40)
        engine.assert_nothing_leaked()


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 caches on CPUs need AVX-512")
def test_an_element_type_that_the_codec_does_not_know_is_refused(model: Path) -> None:
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    from cakekv.errors import BadOption

    try:
        with pytest.raises(BadOption, match="option codec is 'int8'"):
            TinyEngine(model, {"store": "scripted://refused", "codec": "int8"}, kv_cache_dtype="fp8")
    finally:
        ensure_kv_transfer_shutdown()


@contextmanager
def coded_engine(
    recipe: str, encoded: int, model: Path, plain: dict[int, list[int]], **options: Any
) -> Iterator[TinyEngine]:
    """An engine with a codec; a prompt of 1000 tokens is stored."""
    store = scripted(f"coded-{recipe}")
    cake = {"store": f"scripted://coded-{recipe}", "codec": recipe, "load_deadline": PATIENCE_S}
    with closing(TinyEngine(model, cake, **options)) as engine:
        engine.expected = plain[1000]
        engine.encoded = encoded
        one = engine.add(prompt(1000), sampling(2))
        engine.until(lambda: engine.internal(one).num_computed_tokens >= 1000)
        engine.computed = blocks_of(engine, one)
        engine.finish(one)
        engine.settle()
        assert len(list(store)) == CHUNKS
        engine.store = store
        yield engine
        store.recover_now()
        engine.settle()
        engine.assert_nothing_leaked()


@pytest.fixture(scope="module")
def basis(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The digest of a basis of made-up planes, kept for the model as `cakekv codec learn` would."""
    from cakekv.codec.basis import Basis, basis_file, write_basis
    from cakekv.codec.learning import Learner, Seen
    from cakekv.keys import fingerprint_files

    rng, learner = np.random.default_rng(3), Learner()
    for layer in range(3):
        for role in ("keys", "values"):
            learner.see(role, layer, Seen(*rng.standard_normal((2, 2, 300, 32)).astype(np.float32)))
    data = learner.basis().to_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAKEKV_CACHE", str(tmp_path_factory.mktemp("bases")))
        write_basis(data, [basis_file(fingerprint_files(model))])
        yield Basis.from_bytes(data).digest


def test_what_was_not_learned_is_refused(model: Path) -> None:
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    from cakekv.errors import BadOption

    try:
        with pytest.raises(BadOption, match=r"option codec is 'kvtc'.*cakekv codec learn"):
            TinyEngine(model, {"store": "scripted://refused", "codec": "kvtc"})
    finally:
        ensure_kv_transfer_shutdown()


@pytest.fixture(scope="module", params=CODECS)
def coded(request: pytest.FixtureRequest, model: Path, plain: dict[int, list[int]], basis: str) -> Iterator[TinyEngine]:
    """An engine per codec."""
    with coded_engine(request.param, CODECS[request.param], model, plain) as engine:
        yield engine


def test_stored_are_the_encoded_planes_and_the_newest_tokens_as_they_are(coded: TinyEngine) -> None:
    exact_bytes = coded.worker.shards[0].coder.exact.total_bytes
    sizes = sorted(chunk.size for chunk in coded.store)
    assert sum(size < exact_bytes for size in sizes) == coded.encoded
    assert sizes[0] < 0.6 * exact_bytes
    assert sizes.count(exact_bytes) == CHUNKS - coded.encoded


def test_planes_are_keys_and_values_by_head_and_token(coded: TinyEngine, model: Path) -> None:
    """Against what transformers computes."""
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        layers = LlamaForCausalLM.from_pretrained(model)(torch.tensor([prompt(1000)]))[1].layers
    shard = coded.worker.shards[0]
    for chunk in (0, 5):
        for layer, blocks in enumerate(coded.computed[chunk]):
            planes = memoryview(bytearray(len(blocks)))
            shard.orders[layer].to_planes(memoryview(bytearray(blocks)), planes)
            found = np.frombuffer(planes, np.float32).reshape(2, 2, BLOCK, 32)
            for plane, whole in zip(found, (layers[layer].keys, layers[layer].values), strict=True):
                expected = whole[0, :, chunk * BLOCK : (chunk + 1) * BLOCK].numpy()
                np.testing.assert_allclose(plane, expected, atol=2e-3)


def test_what_was_learned_is_part_of_every_key(coded: TinyEngine, basis: str) -> None:
    layout = coded.half.chunk_names.identity.layout
    assert (basis in layout) == (coded.worker.shards[0].coder.codec.name.startswith("kvtc"))


def test_keys_are_turned_as_in_transformers(coded: TinyEngine, model: Path) -> None:
    from transformers import LlamaForCausalLM

    from cakekv.vllm.working.rotation import rotations

    expected = LlamaForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq.tolist()
    found = rotations(coded.llm.llm_engine.vllm_config, 3)
    assert len(found) == 3
    for one in found:
        assert not one.interleaved
        np.testing.assert_allclose(one.frequencies, expected, rtol=1e-6)


def test_turns_that_are_not_known_are_refused(coded: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    from cakekv.errors import UnknownRotation
    from cakekv.vllm.working.rotation import rotations

    config = coded.llm.llm_engine.vllm_config
    plain = next(module for module in rotary_embedding._ROPE_DICT.values() if module.head_size == 32)
    with set_current_vllm_config(config):
        faster = rotary_embedding.RotaryEmbedding(32, 32, 64, 500.0, True, plain.dtype)
        growing = rotary_embedding.DynamicNTKScalingRotaryEmbedding(32, 32, 64, 64, 10000.0, True, 2.0, plain.dtype)
    for modules, words in (([], "no kinds"), ([plain, faster], "2 kinds"), ([growing], "DynamicNTK")):
        monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", dict(enumerate(modules)))
        with pytest.raises(UnknownRotation, match=words):
            rotations(config, 3)


def test_what_is_decoded_is_close_wherever_it_lies(coded: TinyEngine) -> None:
    shard = coded.worker.shards[0]
    for chunk in (0, 5):
        for layer, (near, exact) in enumerate(
            zip(recoded(coded, coded.computed[chunk], chunk * BLOCK), coded.computed[chunk], strict=True)
        ):
            planes = [memoryview(bytearray(len(exact))) for _ in range(2)]
            for blocks, target in zip((near, exact), planes, strict=True):
                shard.orders[layer].to_planes(memoryview(bytearray(blocks)), target)
            one, other = (np.frombuffer(target, np.float32) for target in planes)
            assert 0 < np.linalg.norm(one - other) < 0.2 * np.linalg.norm(other)


def test_loaded_blocks_are_the_decoded_ones_bit_for_bit(coded: TinyEngine) -> None:
    emptied(coded, "load")
    request = coded.add(prompt(1000))
    coded.until(lambda: coded.restoration(request) and coded.restoration(request).joined)
    found = blocks_of(coded, request)
    for chunk in range(CHUNKS):
        lossy = chunk < coded.encoded
        computed = coded.computed[chunk]
        assert found[chunk] == (recoded(coded, computed, chunk * BLOCK) if lossy else computed)
        assert (found[chunk] == coded.computed[chunk]) != lossy
    coded.finish(request)
    coded.settle()
    report = coded.report()
    assert (report.loaded_tokens, report.lossy_tokens, report.after_lossy_tokens) == (896, 128 * coded.encoded, 104)
    codec = coded.half.lossy.codec
    assert report.codec == codec.name
    read, stored = sum(load.bytes for load in report.loads), sum(chunk.size for chunk in coded.store)
    assert read == stored if codec.parts_read == codec.parts else 0.4 * stored < read < 0.8 * stored
    if not codec.fixed:
        assert 0.7 < CHUNKS * coded.half.loads.chunk_bytes / read < 1.4


@pytest.mark.parametrize("let_through", [0, 1, 2])
def test_at_every_meeting_point_the_front_is_exact(coded: TinyEngine, let_through: int) -> None:
    store = emptied(coded, "both")
    request = coded.hang(store, prompt(1000), let_through)
    coded.overtake()
    coded.until(lambda: coded.internal(request).num_computed_tokens >= 1000)
    met = CHUNKS - let_through
    found = blocks_of(coded, request)[:met]
    if not torch.cpu._is_avx512_supported() and met == CHUNKS:  # the last chunk may round otherwise there
        for mine, theirs in zip(found.pop(), coded.computed[met - 1], strict=True):
            np.testing.assert_allclose(np.frombuffer(mine, np.float32), np.frombuffer(theirs, np.float32), atol=1e-5)
    assert found == coded.computed[: len(found)]
    coded.finish(request)
    coded.settle()
    report = coded.report()
    lossy = max(0, coded.encoded - met)
    assert (report.loaded_tokens, report.lossy_tokens) == (BLOCK * let_through, BLOCK * lossy)
    assert report.after_lossy_tokens == (104 if lossy else 0)


def test_nothing_behind_lossy_blocks_is_saved(coded: TinyEngine) -> None:
    """Neither by the request that loaded them, nor by one that finds them in vLLM's own cache."""
    store = emptied(coded, "load")
    writes = store.writes
    coded.run(prompt(1000), sampling(40))  # completes an eighth chunk
    coded.settle()
    coded.set(mode="compute")
    coded.run(prompt(1000) + prompt(300, seed=8))
    coded.settle()
    assert store.writes == writes
    emptied(coded, "compute")
    coded.run(prompt(1000) + prompt(300, seed=8))
    coded.settle()
    assert store.writes > writes, "the control: exact ones are saved"


def test_a_damaged_chunk_is_computed_and_counted(coded: TinyEngine) -> None:
    store = emptied(coded, "load")
    request = coded.add(prompt(1000), sampling(1))
    own = coded.shard_keys(request)[3]
    coded.finish(request)
    content = store.content(own)
    emptied(coded, "load")
    store.damage(own, 5000)
    coded.set(save=False)
    coded.run(prompt(1000))
    coded.settle()
    report = coded.report()
    assert [(miss.start, miss.tokens) for miss in report.misses if miss.reason.startswith("corrupt")] == [(384, 128)]
    assert report.recomputed_tokens == 128
    coded.set(save=True)
    store.inner.write(own, memoryview(content))


def test_what_is_in_the_window_is_never_lossy(coded: TinyEngine) -> None:
    """A shorter prompt whose newest tokens lie in the lossy part of a longer one, shared and stored."""
    window = bool(coded.half.lossy.codec.window)
    store = emptied(coded, "load")
    exact_bytes = coded.worker.shards[0].coder.exact.total_bytes

    def exact_chunks() -> int:
        return sum(chunk.size == exact_bytes for chunk in store)

    stored = exact_chunks()
    coded.run(prompt(1000))
    coded.settle()
    # vLLM has the first seven blocks, but with a window, chunk 4 of this one has to be exact.
    request = coded.add(prompt(1000)[:700])
    coded.finish(request)
    assert coded.outputs[request].num_cached_tokens == (4 if window else 5) * BLOCK
    coded.settle()
    assert exact_chunks() == stored
    # Nor is it loaded; and as it is computed behind exact tokens now, it is stored again, exactly.
    emptied(coded, "compute")
    coded.half.saves.start_anew()
    coded.run(prompt(1000)[:700])
    coded.settle()
    assert exact_chunks() == stored + window
    emptied(coded, "load")
    coded.run(prompt(1000)[:700])
    coded.settle()
    report = coded.report()
    assert (report.loaded_tokens, report.lossy_tokens) == (5 * BLOCK, (4 if window else 5) * BLOCK)
