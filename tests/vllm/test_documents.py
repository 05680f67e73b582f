"""Documents of prompts in a real engine: what lies in the cache where they were reused, and who shares it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_engine import BLOCK, ScriptedStore, TinyEngine, prompt, sampling

from cakekv.chunk import segments

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
        gathered, planes = (memoryview(bytearray(shard.coder.exact.total_bytes)) for _ in range(2))
        shard.gather([block], gathered)()
        parts = zip(segments(shard.coder.exact, gathered), segments(shard.coder.exact, planes), strict=True)
        for layer, (order, (part, plane)) in enumerate(zip(orders, parts, strict=True)):
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
