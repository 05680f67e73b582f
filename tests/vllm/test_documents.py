"""Documents of prompts in a real engine: what lies in the cache where they were reused, and who shares it.

Tests with an engine of their own come first: there is room for one at a time.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_engine import BLOCK, PATIENCE_S, ScriptedStore, TinyEngine, closing, prompt, sampling, scripted
from transformers import AutoTokenizer

from cakekv.chunk import read_header, seal, segments
from cakekv.demo.model import demo_model
from cakekv.errors import BadOption
from cakekv.keys import ChunkKey
from cakekv.vllm.messages import Source
from cakekv.vllm.scheduling.documents import Documents, Marking, separator_tokens
from cakekv.vllm.scheduling.request_options import RequestOptions

HEAD, TAIL = prompt(70, seed=50), prompt(40, seed=51)
FIRST, SECOND = prompt(3 * BLOCK, seed=52), prompt(3 * BLOCK + 20, seed=53)

UNSAVED = sampling(3, extra_args={"kv_transfer_params": {"cakekv": {"save": False}}})


def marked(*spans: tuple[int, int], tokens: int = 6, link: int = 16, **own: Any) -> Any:
    """A request's options that mark documents."""
    own = {"documents": [list(span) for span in spans], "link_tokens": link, "report": True, **own}
    return sampling(tokens, extra_args={"kv_transfer_params": {"cakekv": own}})


def joined(*parts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """A prompt of a head, documents and a tail, and where the documents are."""
    ids, spans = list(HEAD), []
    for part in parts:
        spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return ids + TAIL, spans


def learn(engine: TinyEngine, *documents: list[int]) -> None:
    """Store documents, each as a prompt of its own."""
    for document in documents:
        engine.run(document)
    engine.settle()
    assert engine.core.reset_prefix_cache()


def planes_of(engine: TinyEngine, request: str, tokens: int) -> list[list[npt.NDArray[np.float32]]]:
    """Per layer, the keys and the values of a request's first tokens, (heads, tokens, width)."""
    shard = engine.worker.shards[0]
    shard.documents.prepare()
    orders, blocks = shard.documents.reader._orders, -(-tokens // BLOCK)
    block_ids = engine.scheduler.kv_cache_manager.get_block_ids(engine.internal(request).request_id)[0][:blocks]
    found: list[list[list[npt.NDArray[np.float32]]]] = [[[], []] for _ in orders]
    for block in block_ids:
        parts = [memoryview(bytearray(size)) for size in shard.cache.segment_bytes_per_block]
        shard.cache.gather([block], parts)()
        for layer, (order, part) in enumerate(zip(orders, parts, strict=True)):
            plane = memoryview(bytearray(len(part)))
            order.to_planes(part, plane)
            for which, half in enumerate(np.split(np.frombuffer(plane, np.float32), 2)):
                found[layer][which].append(half.reshape(2, BLOCK, 32))
    return [[np.concatenate(plane, 1)[:, :tokens] for plane in layer] for layer in found]


def computed(engine: TinyEngine, ids: list[int], params: Any = None) -> list[list[npt.NDArray[np.float32]]]:
    """The planes of a prompt once it is complete."""
    request = engine.add(ids, params or sampling(3))
    engine.until(lambda: engine.internal(request).num_computed_tokens >= len(ids))
    planes = planes_of(engine, request, len(ids))
    engine.finish(request)
    return planes


def turned(keys: npt.NDArray[np.float32], distance: int) -> npt.NDArray[np.float32]:
    """Keys moved by so many positions, as Llama turns them."""
    angles = distance / 10000.0 ** (np.arange(16) / 16)
    one, other = keys[..., :16].astype(np.float64), keys[..., 16:].astype(np.float64)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([one * cosine - other * sine, other * cosine + one * sine], -1).astype(np.float32)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_longer_chunks_a_separator_and_a_codec(model: Path, codec: str) -> None:
    """Chunks of two blocks, so that blocks lie across two of them; and engines of another tenant find nothing."""
    ids = [*HEAD, 5, 6, *(document := prompt(4 * BLOCK, seed=55)), 5, 6, *TAIL]
    setup = {"chunk_tokens": 2 * BLOCK, "codec": codec, "mode": "load", "load_deadline": PATIENCE_S}
    setup |= {"store": f"scripted://separated {codec}", "documents_separator": [5, 6]}
    with closing(TinyEngine(model, setup)) as engine:
        exact = computed(engine, ids, sampling(3, extra_args={"kv_transfer_params": {"cakekv": {"documents": []}}}))
        scripted(f"separated {codec}").empty()
        learn(engine, document)
        alone = computed(engine, document)
        assert engine.core.reset_prefix_cache()
        planes = computed(engine, ids)
        report = engine.report()
        assert (report.reused_tokens, report.linked_tokens) == (3 * BLOCK, BLOCK - 72)
        assert len(scripted(f"separated {codec}").opened) <= 4 + 2
        begin, end = BLOCK, 4 * BLOCK
        for (keys, values), (own_keys, own_values), (all_keys, _) in zip(planes, alone, exact, strict=True):
            near = 2e-5 if codec == "raw" else 0.02 * np.abs(own_keys).max()
            np.testing.assert_allclose(
                keys[:, begin:end], turned(own_keys[:, begin - 72 : end - 72], 72), atol=near, rtol=0
            )
            np.testing.assert_allclose(values[:, begin:end], own_values[:, begin - 72 : end - 72], atol=near, rtol=0)
            np.testing.assert_allclose(keys[:, :begin], all_keys[:, :begin], atol=1e-5)
        engine.settle()
        engine.assert_nothing_leaked()


@pytest.mark.parametrize("head", [BLOCK, 70, 250])
def test_a_document_is_moved_and_linked(engine: TinyEngine, store: ScriptedStore, head: int) -> None:
    """What was loaded is the document's own, turned; nothing else is."""
    ids, spans = [*prompt(head, seed=50), *FIRST, *TAIL], [(head, head + len(FIRST))]
    alone, whole = computed(engine, FIRST), computed(engine, ids, UNSAVED)
    learn(engine)
    assert len(list(store)) > 0
    engine.fill_cache(0)
    engine.set(mode="load")
    planes = computed(engine, ids, marked(*spans))
    report = engine.report()
    begin = -(-(head + 16) // BLOCK) * BLOCK
    end = (head + len(FIRST)) // BLOCK * BLOCK
    assert (report.reuse, report.reused_tokens) == ("epic:link=16", end - begin)
    assert report.linked_tokens == begin - head
    assert not report.exact
    for layer, ((keys, values), (own_keys, own_values), (all_keys, all_values)) in enumerate(
        zip(planes, alone, whole, strict=True)
    ):
        part = slice(begin - head, end - head)
        np.testing.assert_allclose(keys[:, begin:end], turned(own_keys[:, part], head), atol=2e-5)
        np.testing.assert_array_equal(values[:, begin:end], own_values[:, part])
        np.testing.assert_allclose(keys[:, :begin], all_keys[:, :begin], atol=1e-5)
        np.testing.assert_allclose(values[:, :begin], all_values[:, :begin], atol=1e-5)
        if layer:
            assert np.abs(values[:, begin:end] - all_values[:, begin:end]).max() > 1e-3


def stepwise(engine: TinyEngine, model: Path, ids: list[int], spans: list[tuple[int, int]]) -> list[Any]:
    """What LegoLink makes of a prompt, by transformers: per layer, the keys and values of all its tokens."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    net = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    cache, position = DynamicCache(config=net.config), 0

    def compute(end: int) -> None:
        with torch.inference_mode():
            net(torch.tensor([ids[position:end]]), past_key_values=cache)

    for start, end in spans:
        begin, last = -(-(start + 16) // BLOCK) * BLOCK, (start + (end - start) // BLOCK * BLOCK) // BLOCK * BLOCK
        compute(begin)
        alone = computed(engine, ids[start:end], UNSAVED)
        for layer, (keys, values) in enumerate(alone):
            part = slice(begin - start, last - start)
            moved = torch.from_numpy(turned(keys[:, part], start))[None]
            cache.update(moved, torch.from_numpy(values[:, part].copy())[None], layer)
        position = last
    compute(len(ids))
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]


def test_two_documents_in_either_order(engine: TinyEngine, store: ScriptedStore, model: Path) -> None:
    """Links see what was reused before them, and so does the question."""
    learn(engine, FIRST, SECOND)
    kept = {chunk.key for chunk in store}
    for parts in ((FIRST, SECOND), (SECOND, FIRST)):
        ids, spans = joined(*parts)
        expected = stepwise(engine, model, ids, spans)
        assert engine.core.reset_prefix_cache()
        engine.fill_cache(0)
        engine.set(mode="load")
        planes = computed(engine, ids, marked(*spans))
        for (keys, values), (right_keys, right_values) in zip(planes, expected, strict=True):
            np.testing.assert_allclose(keys, right_keys, atol=2e-4)
            np.testing.assert_allclose(values, right_values, atol=2e-4)
        report = engine.report()
        assert report.reused_tokens == report.loaded_tokens == report.lossy_tokens == 4 * BLOCK
        assert report.miss_reasons()["linked"] == report.linked_tokens
        assert len(report.spans) >= 3
        assert report.after_lossy_tokens > 0
    engine.settle()
    assert {chunk.key for chunk in store} == kept


def test_a_link_as_long_as_the_documents_is_a_full_prefill(engine: TinyEngine, store: ScriptedStore) -> None:
    ids, spans = joined(FIRST, SECOND)
    exact, planes = engine.run(ids, UNSAVED), computed(engine, ids, UNSAVED)
    learn(engine, FIRST, SECOND)
    assert engine.run(ids, marked(*spans, tokens=3, link=len(SECOND), save=False)) == exact
    assert engine.core.reset_prefix_cache()
    again = computed(engine, ids, marked(*spans, link=len(SECOND), save=False))
    for one, other in zip(planes, again, strict=True):
        for plane, same in zip(one, other, strict=True):
            np.testing.assert_allclose(plane, same, atol=1e-5)
    engine.run(ids, marked(*spans, link=len(SECOND)))
    engine.settle()
    assert len(list(store)) == 6 + len(ids) // BLOCK, "it is a request like any other"


def test_with_nothing_stored_it_is_exact(engine: TinyEngine, store: ScriptedStore) -> None:
    ids, spans = joined(FIRST, SECOND)
    exact = engine.run(ids, UNSAVED)
    assert engine.run(ids, marked(*spans, tokens=3)) == exact
    engine.settle()
    assert not list(store)


def test_an_exact_prefix_wins(engine: TinyEngine, store: ScriptedStore) -> None:
    ids, spans = joined(FIRST, SECOND)
    learn(engine, ids[: 5 * BLOCK], FIRST, SECOND)
    engine.set(mode="load")
    engine.run(ids, marked(*spans))
    report = engine.report()
    assert (report.loaded_tokens, report.reused_tokens, report.linked_tokens) == (6 * BLOCK, BLOCK, 0)


def poison(engine: TinyEngine, store: ScriptedStore) -> None:
    """Put something else under every key, as a store would that mixes them up and hides it."""
    coder = engine.worker.shards[0].coder
    for chunk in list(store):
        data = memoryview(bytearray(store.content(chunk.key)))
        position = read_header(data, len(data)).position
        rng = np.random.default_rng(position)
        for part in segments(coder.exact, data):
            np.frombuffer(part, np.float32)[:] = rng.standard_normal(len(part) // 4)
        seal(coder.exact, data, chunk.key, position)
        store.inner.write(chunk.key, data)


def test_no_exact_request_sees_what_was_reused(engine: TinyEngine, store: ScriptedStore) -> None:
    """Everything stored is wrong: who reuses it answers wrongly, and nobody else does."""
    ids, spans = joined(FIRST, SECOND)
    longer = ids + prompt(300, seed=54)
    exact, exact_longer = engine.run(ids, UNSAVED), engine.run(longer, UNSAVED)
    learn(engine, FIRST, SECOND)
    poison(engine, store)
    engine.set(mode="load")
    wrong = engine.run(ids, marked(*spans, tokens=3))
    assert wrong != exact
    assert engine.report().reused_tokens == 4 * BLOCK
    requests = [
        engine.add(ids, UNSAVED),
        engine.add(ids, marked(*spans, tokens=3)),
        engine.add(longer, UNSAVED),
        engine.add(longer, marked(*spans, tokens=40)),
        engine.add(longer),
    ]
    answers = engine.finish(*requests)
    assert answers[0] == exact
    assert answers[1] == wrong
    assert answers[2] == answers[4][:3] == exact_longer
    engine.settle()
    engine.set(mode="compute")
    assert engine.core.reset_prefix_cache()
    engine.set(mode="load")
    assert engine.run(longer, UNSAVED) == exact_longer, "what was saved beside it is right"


def test_equal_requests_share_and_others_do_not(engine: TinyEngine, store: ScriptedStore) -> None:
    learn(engine, FIRST, SECOND)
    engine.set(mode="load")
    ids, spans = joined(FIRST, SECOND)
    first = engine.run(ids, marked(*spans))
    opened = len(store.opened)

    def cached(params: Any, **options: Any) -> int:
        request = engine.add(ids, params, **options)
        engine.finish(request)
        return int(engine.outputs[request].num_cached_tokens)

    assert engine.run(ids, marked(*spans)) == first
    assert len(store.opened) == opened, "nothing was loaded again"
    assert cached(marked(*spans)) >= 6 * BLOCK
    assert cached(UNSAVED) == 0
    assert cached(marked(*spans, mode="compute", save=False)) >= 6 * BLOCK, "that is what the exact one left"
    engine.core.reset_prefix_cache()
    for params in (marked(*spans), marked(*spans, link=17), marked(spans[0]), UNSAVED):
        request = engine.add(ids, params)
        engine.until(lambda request=request: engine.internal(request).num_computed_tokens >= len(ids))
        known = engine.internal(request).prefill_stats
        assert known is None or known.num_local_cached_tokens == 0
        engine.finish(request)


def test_salts_and_adapters_keep_documents_apart(engine: TinyEngine, store: ScriptedStore) -> None:
    engine.run(FIRST, cache_salt="mine")
    engine.settle()
    ids, spans = joined(FIRST)
    engine.set(mode="load")
    for salt, loaded in (("", 0), ("yours", 0), ("mine", 2 * BLOCK)):
        store.opened.clear()
        engine.run(ids, marked(*spans), **({"cache_salt": salt} if salt else {}))
        assert len(store.opened) == (3 if loaded else 0), salt
    assert engine.report().reused_tokens == 2 * BLOCK


def test_a_damaged_chunk_is_computed(engine: TinyEngine, store: ScriptedStore) -> None:
    ids, spans = joined(FIRST)
    exact = engine.run(ids, UNSAVED)
    learn(engine, FIRST)
    for chunk in store:
        store.damage(chunk.key)
    engine.set(mode="load")
    assert engine.run(ids, marked(*spans, tokens=3)) == exact
    report = engine.report()
    assert report.reused_tokens == 0
    assert report.miss_reasons()["corrupt: segment checksum"] == 2 * BLOCK


def test_broken_off_and_begun_again(engine: TinyEngine, store: ScriptedStore) -> None:
    """Aborted while its loads hang, and sent back while it computes: nothing is left, and the answer is the same."""
    learn(engine, FIRST, SECOND)
    ids, spans = joined(FIRST, SECOND)
    engine.set(mode="load")
    expected = engine.run(ids, marked(*spans, tokens=40))
    assert engine.core.reset_prefix_cache()
    store.opened.clear()
    store.gate.clear()
    gone, kept = engine.add(ids, marked(*spans)), engine.add(ids, marked(*spans, tokens=40))
    engine.until(lambda: len(store.opened) >= 2)
    engine.llm.llm_engine.abort_request([gone])
    engine.step(2)
    store.gate.set()
    engine.until(lambda: engine.internal(kept).num_output_tokens)
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    assert engine.finish(kept) == [expected]
    engine.settle()
    assert len(list(store)) == 6


@pytest.mark.parametrize(
    "own",
    [
        {"documents": [[70, 5000]]},
        {"documents": [[70, 300], [200, 454]]},
        {"documents": [[70, 454]], "link_tokens": -1, "mode": "compute"},
        {"documents": [[70]]},
        {"documents": [["70", 454.0]]},
        {"documents": {"70": 454}},
        {"documents": [[70, 10**18]]},
    ],
)
def test_marks_that_cannot_be_are_ignored(engine: TinyEngine, store: ScriptedStore, own: dict[str, Any]) -> None:
    ids, _ = joined(FIRST)
    exact = engine.run(ids, UNSAVED)
    learn(engine, FIRST)
    params = {"kv_transfer_params": {"cakekv": {"save": False, **own}}}
    assert engine.run(ids, sampling(3, extra_args=params)) == exact
    engine.settle()


def test_refused_with_the_reason(engine: TinyEngine, store: ScriptedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, spans = joined(FIRST)
    exact = engine.run(ids, UNSAVED)
    learn(engine, FIRST, ids[:BLOCK])
    engine.set(mode="load")
    monkeypatch.setattr(engine.half.admission._marking, "_refused", "keys are odd")
    assert engine.run(ids, marked(*spans, tokens=3, save=False)) == exact
    assert engine.report().reused_tokens == 0
    assert engine.report().notes == ["No document was reused: keys are odd."]


def test_what_stands_between_separators() -> None:
    marking = Marking([5, 5], "")
    request = SimpleNamespace(prompt_token_ids=[1, 5, 5, 2, 3, 5, 5, 5, 5, 4, 5, 5, 6])
    assert marking.spans(request, RequestOptions("auto", True, False)) == [(3, 5), (9, 10)]
    assert marking.spans(request, RequestOptions("auto", True, False, ())) == ()
    assert Marking([], "").spans(request, RequestOptions("auto", True, False)) == ()


def test_a_separator_that_is_a_text() -> None:
    from vllm.config import ModelConfig

    config = ModelConfig(model=str(demo_model()))
    tokens = separator_tokens("\n\n# # #\n\n", config)
    assert AutoTokenizer.from_pretrained(demo_model()).decode(tokens) == "\n\n# # #\n\n"
    assert separator_tokens("", config) == ()
    with pytest.raises(BadOption, match="no tokenizer"):
        separator_tokens("#", SimpleNamespace(skip_tokenizer_init=True))


def test_blocks_are_cut_from_two_chunks() -> None:
    """Chunks of four blocks, a document that begins within one."""
    key = [ChunkKey(bytes([number]) * 32) for number in range(5)]
    documents = Documents([(20, 20 + 190)], 10, 64, 16, lambda start, end: key[2:4])
    layout = documents.lay_out(230, 0, key[:2], [(), (), (0, 1), (1,)])
    assert layout.grid.starts == [0, 32, 80, 144, 192]
    assert layout.stored == [(), (0, 1), (1,), (), ()]
    assert layout.sources == {
        1: (Source(key[2], 0, 12, 60, True),),
        2: (Source(key[2], 0, 60, 64, True), Source(key[3], 64, 0, 60)),
    }
    assert layout.linked == [range(20, 32)]
