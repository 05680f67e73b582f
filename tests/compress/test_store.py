"""A `Cake` whose chunks are stored without all of their rows: what it loads, what it computes over that, what it saves.

What is expected is worked out from the full cache: every chunk's rows with the smallest keys, per layer and head.
"""

from __future__ import annotations

import random
from threading import Event
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cakekv.cake import Cake
from cakekv.codec import codec_named
from cakekv.codec.rows import Rows
from cakekv.compress.key_norm import KeyNorm
from cakekv.engine.cache import TwoEndedLayer
from cakekv.engine.ragged import RaggedCache, RaggedLayer
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey, chunk_keys
from cakekv.load import pieces as cutting
from cakekv.prompt import Document
from cakekv.store.disk import DiskStore
from cakekv.store.maintenance.copying import copy
from cakekv.store.maintenance.migrate import migrate
from cakekv.store.maintenance.verify import verify
from cakekv.store.memory import MemoryStore
from tests.codec.test_restores import Paced, Slow, stored
from tests.engine.toy import ToyEngine
from tests.matrix.models import build

CHUNK, CHUNKS, SUFFIX = 16, 8, 5
END = CHUNK * CHUNKS
HALF = "key_norm:share=0.5"
MERGED = "kvmerger:share=0.5,first_layers=0,last_layers=0,when=store"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    engine = TransformersEngine(build("llama").float())
    engine.stop_tokens = frozenset()
    return engine


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """No token stands twice in a chunk: in the first layer, their keys would be as long."""
    rng = random.Random(3)
    return [token for _ in range(CHUNKS) for token in rng.sample(range(3, 128), CHUNK)] + [3, 1, 4, 1, 5]


def cake_of(engine: Any, store: Any = None, compress: Any = HALF, **options: Any) -> Cake:
    options = {"chunk_tokens": CHUNK, "max_span_tokens": 2 * CHUNK, "compress": compress, **options}
    return Cake(engine, None, store, **options)


def filled(engine: Any, prompt: list[int], compress: Any = HALF, **options: Any) -> MemoryStore:
    store = MemoryStore()
    with cake_of(engine, store, compress, **options) as cake:
        cake.prefill(prompt)
        assert cake.wait_saved().error is None
    return store


def expected_absent(layer: TwoEndedLayer, share: float = 0.5) -> torch.Tensor:
    """(kv_heads, END): of a layer of the full cache."""
    norms = layer.plane(0)[0, :, :END].float().norm(dim=-1).unflatten(1, (CHUNKS, CHUNK))
    absent = torch.ones(norms.shape, dtype=torch.bool)
    kept = norms.argsort(-1)[..., : round(share * CHUNK)]
    return absent.scatter_(-1, kept, False).flatten(1) & (layer.window is None)


class Held(MemoryStore):
    """Writes only once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = Event()

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self.may_write.wait(60)
        return super().write(key, data)


def with_rows_dropped(full: Any) -> RaggedCache:
    """The prefix's cache without those rows."""
    layers: list[Any] = []
    for layer in full.layers:
        if isinstance(layer, TwoEndedLayer):
            keys, values = (layer.plane(number)[0, :, :END].clone() for number in (0, 1))
            positions = torch.arange(END).repeat(len(keys), 1).masked_fill(expected_absent(layer), -1)
            layer = RaggedLayer(keys, values, positions, END, layer.window)
        layers.append(layer)
    return RaggedCache(layers)


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_attends_to_rows_that_were_not_stored(family: str, dtype: torch.dtype, prompt: list[int]) -> None:
    """Neither the suffix nor the answer: they come out as over a cache without those rows, not as over a full one."""
    engine = TransformersEngine(build(family).to(dtype))
    store = filled(engine, prompt)
    with cake_of(engine, None, None) as plain:
        full = plain.prefill(prompt)
    with cake_of(engine, store) as cake:
        restored = cake.prefill(prompt, mode="load", room=8)
        answer = cake.generate(prompt, mode="load", max_new_tokens=6).token_ids
    assert restored.report.loaded_tokens == END
    ragged = with_rows_dropped(full.cache)
    logits, tokens, tolerance = engine.compute(ragged, prompt[END:], END), [], 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(restored.logits, logits, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(restored.logits, full.logits, rtol=tolerance, atol=tolerance)
    for place in range(6):
        tokens.append(int(logits.argmax()))
        logits = engine.compute(ragged, tokens[-1:], len(prompt) + place)
        own = engine.compute(restored.cache, tokens[-1:], len(prompt) + place)
        torch.testing.assert_close(own, logits, rtol=tolerance, atol=tolerance)
    assert answer == tokens or dtype is torch.bfloat16
    report = restored.report
    assert report.compress == "key_norm:share=0.5,when=store"
    assert report.codec == "raw+key_norm"
    absent = sum(int(expected_absent(layer).sum()) for layer in full.cache.stored)
    assert report.kept_share == 1 - absent / (len(prompt) * sum(layer.key_heads for layer in full.cache.stored))


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_every_meeting_point(engine: TransformersEngine, prompt: list[int], codec: str) -> None:
    """The computed front is whole and exact, the loaded back is what was stored, and nothing sees the rest."""
    whole = stored(filled(engine, prompt, codec=codec))
    with cake_of(engine, None, None) as plain:
        full = plain.prefill(prompt)
    for meeting in range(CHUNKS + 1):
        fewer = MemoryStore()
        with cake_of(engine, fewer, codec=codec) as cake:
            for key in chunk_keys(cake.identity, prompt)[meeting:CHUNKS]:
                fewer.write(key, memoryview(whole[bytes(key)]))
            mixed = cake.prefill(prompt, mode="load", save=False)
        at = meeting * CHUNK
        assert mixed.report.computed_tokens == at + SUFFIX
        for layer, exact in zip(mixed.cache.stored, full.cache.stored, strict=True):
            absent = expected_absent(exact)
            absent[:, :at] = False
            assert torch.equal(layer.absent[:, :END], absent)
            for number in (0, 1):
                own, theirs = layer.plane(number)[0, :, :END], exact.plane(number)[0, :, :END]
                torch.testing.assert_close(own[:, :at], theirs[:, :at], rtol=1e-5, atol=1e-5)
                assert not own[absent].any()
                error = float((own - theirs)[~absent].abs().max())
                assert error < 1e-5 if codec == "raw" else error < 0.05


@pytest.mark.parametrize("compress", [HALF, MERGED])
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_the_front_may_be_what_is_stored_of_it(
    engine: TransformersEngine, prompt: list[int], compress: str, codec: str
) -> None:
    """Wherever the arms meet, the same rows are there, with the same in them, and the same is answered."""
    options: dict[str, Any] = {"codec": codec, "compress": compress, "compress_front": True, "max_span_tokens": CHUNK}
    whole = stored(filled(engine, prompt, **options))
    found, loaded = [], []
    for meeting in range(CHUNKS, -1, -1):
        fewer = MemoryStore()
        with cake_of(engine, fewer, **options) as cake:
            for key in chunk_keys(cake.identity, prompt)[meeting:CHUNKS]:
                fewer.write(key, memoryview(whole[bytes(key)]))
            found.append(cake.prefill(prompt, mode="load", save=False))
            loaded.append(cake.generate(prompt, mode="load", save=False, max_new_tokens=6).token_ids)
        assert found[-1].report.loaded_tokens == (CHUNKS - meeting) * CHUNK
    *_, restored = found
    assert 0.3 < restored.report.kept_share < 0.8
    assert 0 < restored.report.cache_bytes < engine.held_bytes(engine.new_cache(len(prompt)))
    for mixed in found:
        assert mixed.report.kept_share == restored.report.kept_share
        assert mixed.report.compress == restored.report.compress != ""
        torch.testing.assert_close(mixed.logits, restored.logits, rtol=1e-4, atol=1e-4)
        for layer, other in zip(mixed.cache.stored, restored.cache.stored, strict=True):
            assert torch.equal(layer.positions, other.positions)
            there = (layer.positions >= 0) & (layer.positions < END)
            for own, theirs in ((layer.keys[0], other.keys[0]), (layer.values[0], other.values[0])):
                assert torch.equal(own[there], theirs[there])
                torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    assert all(answer == loaded[0] for answer in loaded)


@pytest.mark.parametrize("compress", [HALF, MERGED])
def test_what_is_made_of_the_front_is_never_saved(engine: TransformersEngine, prompt: list[int], compress: str) -> None:
    """The chunks that are saved are those that are saved without it; answers over it are not."""
    plain = stored(filled(engine, prompt, compress))
    held = Held()
    with cake_of(engine, held, compress, compress_front=True) as cake:
        answer = cake.generate(prompt, max_new_tokens=2 * CHUNK)
        held.may_write.set()
        assert cake.wait_saved().failed_chunks == 0
        assert answer.report.exact
        assert answer.report.kept_share < 1
        loaded = cake.prefill(prompt, mode="load")
    assert stored(held) == plain
    assert loaded.report.loaded_tokens == END
    with cake_of(engine, held, None) as exact, cake_of(engine, None, None) as fresh:
        again = exact.prefill(prompt, mode="load")
        assert again.report.loaded_tokens == 0
        torch.testing.assert_close(again.logits, fresh.prefill(prompt).logits, rtol=1e-4, atol=1e-4)


def test_a_front_that_ends_with_the_prompt(engine: TransformersEngine, prompt: list[int]) -> None:
    """The last token is computed whatever is stored, over what is left of its own chunk, too."""
    prompt = prompt[:END]
    store = filled(engine, prompt)
    with cake_of(engine, store, compress_front=True) as cake:
        one, other = (cake.prefill(prompt, mode=mode, save=False) for mode in ("load", "compute"))
    assert (one.report.loaded_tokens, other.report.loaded_tokens) == (END - 1, 0)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    for layer, same in zip(one.cache.stored, other.cache.stored, strict=True):
        assert torch.equal(layer.positions, same.positions)


def test_a_front_of_which_all_is_stored(engine: TransformersEngine, prompt: list[int]) -> None:
    """Because it is kept, because it is as new as the codec's window, or because it is shorter than a chunk."""
    with cake_of(engine, None, None) as plain:
        full = plain.prefill(prompt)
        short = plain.prefill(prompt[:9])
    with cake_of(engine, None, "key_norm:share=1", compress_front=True) as cake:
        assert torch.equal(cake.prefill(prompt).logits, full.logits)
    with cake_of(engine, None, compress_front=True) as cake:
        kept = cake.prefill(prompt[:9])
        assert torch.equal(kept.logits, short.logits)
        assert (kept.report.kept_share, kept.report.compress) == (1.0, "")
    with cake_of(engine, None, codec=f"int8:window={2 * CHUNK + SUFFIX}", compress_front=True) as cake:
        layers = cake.prefill(prompt).cache.stored
    for layer in layers:
        newest = layer.positions[:, -2 * CHUNK - SUFFIX :]
        assert torch.equal(newest, torch.arange(END - 2 * CHUNK, len(prompt)).expand_as(newest))


@pytest.mark.parametrize("later", ["heavy_hitter:share=0.3,rows=8", "sink_recent:recent=40"])
def test_a_method_goes_on_with_the_front(engine: TransformersEngine, prompt: list[int], later: str) -> None:
    """Which it sees as it is stored: so it chooses the same, whatever was loaded."""
    store, found = filled(engine, prompt), []
    with cake_of(engine, store, f"{HALF}+{later}", compress_front=True) as cake:
        for mode in ("load", "compute"):
            found.append(cake.prefill(prompt, mode=mode, save=False))
    one, other = found
    assert one.report.kept_share == other.report.kept_share < 0.4
    for layer, same in zip(one.cache.stored, other.cache.stored, strict=True):
        assert torch.equal(layer.positions, same.positions)


def test_a_front_is_for_methods_that_act_at_store(engine: TransformersEngine) -> None:
    for compress in (None, "key_norm:when=prefill"):
        with pytest.raises(BadInput, match=r"compress_front makes .*: give a compress that acts at store"):
            cake_of(engine, None, compress, compress_front=True)


def test_layered_finish(engine: TransformersEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are found absent while the suffix is computed, and hidden from it."""
    monkeypatch.setattr(cutting, "_LEAST_READ_BYTES", 1)
    long = prompt[:END] + prompt[:100]
    store = Slow()
    with cake_of(engine, store) as cake:
        cake.prefill(prompt)
    with cake_of(Paced(engine.model), store) as cake:
        for _ in range(40):  # the first ones teach what both arms cost
            mixed = cake.prefill(long, mode="both", save=False)
            again = engine.compute(mixed.cache, long[END:], END)
            torch.testing.assert_close(mixed.logits, again, rtol=1e-4, atol=1e-4)
            if any(load.group is not None for load in mixed.report.loads):
                return
    pytest.fail("no suffix was finished in layers")


def test_all_rows_are_the_raw_chunks(engine: TransformersEngine, prompt: list[int]) -> None:
    """share=1: bit for bit what raw chunks give, in half precision, too."""
    for one in (engine, TransformersEngine(build("llama").to(torch.bfloat16))):
        results = []
        for compress in (None, "key_norm:share=1"):
            store = filled(one, prompt, compress)
            with cake_of(one, store, compress) as cake:
                results.append(cake.prefill(prompt, mode="load"))
        raw, rows = results
        assert torch.equal(raw.logits, rows.logits)
        assert rows.report.kept_share == 1.0
        assert not rows.report.compress
        for layer, other in zip(raw.cache.stored, rows.cache.stored, strict=True):
            for region, same in zip(layer.regions, other.regions, strict=True):
                assert torch.equal(region[:, :END], same[:, :END])


def test_chunks_are_smaller_and_more_of_them_are_loaded(prompt: list[int]) -> None:
    """Where raw chunks meet compute in the middle, smaller ones are loaded up to nearer the front."""
    config = build("llama").config
    config.head_dim = 64
    engine, sizes, loaded = TransformersEngine(LlamaForCausalLM(config)), [], []
    for compress in (None, "key_norm:share=0.25"):
        store = filled(engine, prompt, compress)
        sizes.append(sum(chunk.size for chunk in store))
        with cake_of(engine, store, compress, layered_finish=False) as cake:
            for number in range(50):  # whatever this machine does: raw chunks take about as long as computing them
                for tokens in (CHUNK, 2 * CHUNK):
                    cake.compute_cost.observe(0, tokens, tokens / CHUNK)
                for size in (1 << 14, 1 << 15):
                    cake.load_costs[0].observe(size, 10.0 * number, 10.0 * number + size / 50000, alone=True)
            runs = cake.plan(prompt)
            loaded.append(sum(run.tokens for run in runs if run.how != "compute"))
    assert sizes[1] < 0.4 * sizes[0]
    assert 0 < loaded[0] < loaded[1]


def test_damage_is_found_and_recomputed(engine: TransformersEngine, prompt: list[int]) -> None:
    store = filled(engine, prompt, codec="int8")
    with cake_of(engine, store, codec="int8") as cake:
        keys = chunk_keys(cake.identity, prompt)
        data = bytearray(stored(store)[bytes(keys[3])])
        data[4200] ^= 4
        store.write(keys[3], memoryview(data))
        report = cake.prefill(prompt, mode="load").report
    assert report.recomputed_tokens == CHUNK
    assert any(reason.startswith("corrupt: segment") for reason in report.miss_reasons())


def test_nothing_inexact_is_saved(engine: TransformersEngine, prompt: list[int]) -> None:
    """Neither what is computed behind such chunks nor the answer; and exact Cakes never find them."""
    store = filled(engine, prompt)
    before = stored(store)
    longer = [*prompt, *prompt[:60]]
    with cake_of(engine, store) as cake:
        report = cake.prefill(longer, mode="load").report
        assert report.lossy_tokens == END
        assert report.after_lossy_tokens == len(longer) - END
        cake.generate(longer, mode="load", max_new_tokens=2 * CHUNK)
        restored = cake.prefill(prompt, mode="load")
        cake.wait_saved()
        segments = [engine.staging(size) for size in engine.layout.segment_bytes(CHUNK)]
        with pytest.raises(BadInput, match="rows are absent: they were not stored"):
            engine.gather(restored.cache, CHUNK, CHUNK, segments)
    assert stored(store) == before
    roots = set()
    for compress in (None, HALF, "key_norm:share=0.4"):
        for codec in ("raw", "int8"):
            with cake_of(engine, store, compress, codec=codec) as cake:
                roots.add(cake.identity.root)
                if (compress, codec) != (HALF, "raw"):
                    assert cake.prefill(prompt, mode="load", save=False).report.loaded_tokens == 0
    assert len(roots) == 6
    with cake_of(engine, None, "key_norm:when=prefill") as later, cake_of(engine, None, None) as plain:
        assert later.identity == plain.identity


def test_an_answer_over_what_was_computed_is_saved(engine: TransformersEngine, prompt: list[int]) -> None:
    store = MemoryStore()
    with cake_of(engine, store) as cake:
        answer = cake.generate(prompt, max_new_tokens=2 * CHUNK)
        assert answer.report.exact
        assert not answer.report.compress
        cake.wait_saved()
        longer = cake.prefill([*prompt, *answer.token_ids, 5], mode="load")
    assert longer.report.loaded_tokens > END + CHUNK


def test_the_newest_tokens_are_stored_whole(engine: TransformersEngine, prompt: list[int]) -> None:
    """The codec's window."""
    codec = f"int8:window={2 * CHUNK + SUFFIX}"
    store = filled(engine, prompt, codec=codec)
    with cake_of(engine, store, codec=codec) as cake:
        report = cake.prefill(prompt, mode="load")
    assert report.report.lossy_tokens == END - 2 * CHUNK
    for layer in report.cache.stored:
        assert not layer.absent[:, END - 2 * CHUNK :].any()
        assert layer.absent[:, : END - 2 * CHUNK].any()


@pytest.mark.parametrize("later", ["heavy_hitter:share=0.3,rows=8", "heavy_hitter:share=0.3", "sink_recent:recent=40"])
def test_a_method_goes_on_with_what_is_there(engine: TransformersEngine, prompt: list[int], later: str) -> None:
    """It neither sees nor keeps rows that are absent."""
    store = filled(engine, prompt)
    with cake_of(engine, store, f"{HALF}+{later}") as cake:
        answer = cake.generate(prompt, mode="load", max_new_tokens=6)
        kept = cake.prefill(prompt, mode="load").cache
    with cake_of(engine, store) as cake:
        restored = cake.prefill(prompt, mode="load").cache
    assert answer.report.compress.startswith("key_norm:share=0.5,when=store+")
    assert 0 < answer.report.kept_share < 0.4
    for layer, before in zip(kept.stored, restored.stored, strict=True):
        for head, positions in enumerate(layer.positions):
            assert not before.absent[head, positions[positions >= 0]].any()


def test_a_document_is_reused_where_it_stands(engine: TransformersEngine, prompt: list[int]) -> None:
    """Its rows are turned to other positions; those that are absent stay so."""
    store, document = MemoryStore(), prompt[:END]
    with cake_of(engine, store, reuse="epic:link=0") as cake:
        cake.learn(Document(document))
        cake.wait_saved()
        prefill = cake.prefill([[9, 8, 7], Document(document), [3, 4]], mode="load")
    assert prefill.report.reused_tokens == END
    for layer in prefill.cache.stored:
        assert layer.absent[:, 3 : 3 + END].sum() == END  # two heads, half of each
        assert not layer.absent[:, :3].any()
        assert not layer.absent[:, 3 + END :].any()
    assert torch.isfinite(prefill.logits).all()


def test_what_else_could_read_such_a_cache_is_refused(engine: TransformersEngine, prompt: list[int]) -> None:
    with cake_of(engine, filled(engine, prompt)) as cake:
        prefill = cake.prefill(prompt, mode="load", room=4)
    with pytest.raises(BadInput, match="rows are absent"):
        prefill.dynamic_cache()
    with pytest.raises(BadInput, match=r"rows of this cache are absent.*Have Cake\.generate answer"), torch.no_grad():
        engine.model(torch.tensor([[5]]), past_key_values=prefill.cache)
    assert torch.isfinite(engine.compute(prefill.cache, [5], len(prompt))).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codec": "cachegen"}, "codec cachegen does not go with compress key_norm at store, because its codes vary"),
        ({"codec": "two_plane"}, "because it stores chunks in parts"),
        ({"compress": "key_norm:when=later"}, "when is later, but must be store or prefill"),
        ({"compress": "key_norm+key_norm:share=0.1"}, "both choose which tokens to keep at store"),
        ({"decode": "whole"}, "decode whole needs a cache that has everything, and compress key_norm lets go"),
        ({"reuse": "blend"}, "reuse blend looks at all of a document"),
    ],
)
def test_refused(engine: TransformersEngine, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        cake_of(engine, **options)


def test_models_and_engines_that_cannot_hide_rows_are_refused() -> None:
    for engine in (TransformersEngine(build("bloom")), ToyEngine()):
        with pytest.raises(BadInput, match=r"compress key_norm does not work with this model: .*Give no compress"):
            cake_of(engine)


def test_stores_keep_such_chunks_as_any_others(engine: TransformersEngine, prompt: list[int], tmp_path: Any) -> None:
    """They are sound, can be copied, and are not packed: they are small already."""
    with DiskStore(tmp_path / "one") as store, DiskStore(tmp_path / "other") as other:
        with cake_of(engine, store) as cake:
            first = cake.prefill(prompt)
            cake.wait_saved()
        [condition] = verify(store)
        assert (condition.chunks, condition.corrupt) == (CHUNKS, {})
        copy(store, other)
        assert not migrate(other).corrupt
        with cake_of(engine, other) as cake:
            restored = cake.prefill(prompt, mode="load")
    assert restored.report.loaded_tokens == END
    assert not torch.allclose(first.logits, restored.logits)
    assert isinstance(cake.codec, Rows)
    assert cake.codec == Rows(method=KeyNorm(), inner=codec_named("raw"))
