"""Elastic Cache: anchors, buckets, and what goes while an answer grows."""

from __future__ import annotations

import pytest
import torch

from cakekv.compress import method_named
from cakekv.compress.base import Layer
from cakekv.compress.elastic_cache import ElasticCache
from cakekv.engine.ragged import RaggedCache
from cakekv.errors import BadInput
from tests.compress.layers import HEADS, complete, compressed, engine_of, prompt_of, toy, without_queries


def expected(layer: Layer, share: float) -> tuple[list[int], dict[int, list[int]]]:
    """What is kept, and what is in the bucket of each anchor, by the paper."""
    tokens = layer.length
    received = layer.attention().sum(2).mean((0, 1)).tolist()
    always = {*range(min(4, tokens)), tokens - 1}
    budget = tokens - int(tokens * (1 - share) + 1e-9)
    order = sorted(set(range(tokens)) - always, key=lambda token: -received[token])
    anchors = sorted(order[: max(0, budget - len(always))])
    buckets = {anchor: [anchor] for anchor in anchors}
    for token in order:
        if anchors and token not in anchors:
            buckets[min(anchors, key=lambda anchor: (abs(anchor - token), anchor))].append(token)
    return sorted({*always, *anchors}), buckets


@pytest.mark.parametrize("share", [0.15, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("length", [6, 41])
def test_as_the_paper_has_it(share: float, length: int) -> None:
    """The greatest sums of all heads, and means that include the anchor; nothing becomes of the first and the last."""
    layer = toy(length, rows=None)
    kept, buckets = expected(layer, share)
    method = ElasticCache(share=share)
    [mask] = method.keep([layer])
    assert mask is not None
    assert [row.nonzero().flatten().tolist() for row in mask] == [kept] * HEADS
    merged = method.merge(layer, mask)
    if not buckets:
        assert merged is None
        return
    assert merged is not None
    for rows, before in ((merged.keys, layer.keys), (merged.values, layer.values)):
        for token in kept:
            mean = before[:, buckets.get(token, [token])].mean(1)
            torch.testing.assert_close(rows[:, token], mean)


def test_what_is_merged() -> None:
    """Keys may stay the anchors', and nothing may be merged; the same tokens are kept."""
    layer = toy(41)
    masks = [ElasticCache(merging=merging).keep([layer])[0] for merging in ("both", "values", "no")]
    assert masks[0] is not None
    assert all(torch.equal(mask, masks[0]) for mask in masks if mask is not None)
    both = ElasticCache().merge(layer, masks[0])
    values = ElasticCache(merging="values").merge(layer, masks[0])
    assert both is not None
    assert values is not None
    assert torch.equal(values.keys, layer.keys)
    assert torch.equal(values.values, both.values)
    assert ElasticCache(merging="no").merge(layer, masks[0]) is None


def positions_after(recipe: str, steps: int) -> tuple[list[int], list[int]]:
    """What the first head holds before and after an answer of so many tokens."""
    engine = engine_of()
    cache = compressed(recipe, engine)
    assert isinstance(cache, RaggedCache)
    layer = cache.stored[1]
    before = layer.positions[0][layer.positions[0] >= 0].tolist()
    for step in range(steps):
        engine.compute(cache, [5 + step], 60 + step)
    assert len({int((row >= 0).sum()) for row in layer.positions}) == 1, "all heads have as many"
    return before, layer.positions[0][layer.positions[0] >= 0].tolist()


@pytest.mark.parametrize(("answering", "at"), [("fixed", 36 - 25), ("oldest", 4)])
def test_while_an_answer_grows(answering: str, at: int) -> None:
    """The share stays, one by one goes from the same place, and the newest stay."""
    before, after = positions_after(f"elastic_cache:share=0.6,answering={answering}", 20)
    assert len(before) == 36
    assert len(after) == 80 - int(80 * 0.4)
    gone = len(before) + 20 - len(after)
    assert after == [*before, *range(60, 80)][:at] + [*before, *range(60, 80)][at + gone :]


def test_an_answer_may_keep_all() -> None:
    before, after = positions_after("elastic_cache:share=0.6,answering=no", 5)
    assert after == [*before, *range(60, 65)]


def test_what_goes_while_answering_is_not_merged() -> None:
    engine = engine_of()
    cache = compressed("elastic_cache:share=0.6", engine)
    assert isinstance(cache, RaggedCache)
    layer = cache.stored[0]
    before = {int(position): layer.values[0, 0, column] for column, position in enumerate(layer.positions[0])}
    for step in range(8):
        engine.compute(cache, [5], 60 + step)
    for column, position in enumerate(layer.positions[0].tolist()):
        if position in before and position >= 0:
            assert torch.equal(layer.values[0, 0, column], before[position])


def test_keeping_all_is_the_same_cache() -> None:
    engine = engine_of()
    cache = complete(engine, 40)
    assert engine.compress(cache, prompt_of(engine, 40), method_named("elastic_cache:share=1")) is cache


@pytest.mark.parametrize("tokens", [1, 2, 5, 7])
def test_short_prompts(tokens: int) -> None:
    """Short ones lose nothing that is kept always; the answer goes on."""
    engine = engine_of()
    cache = compressed("elastic_cache:share=0.2", engine, tokens)
    for step in range(30):
        assert engine.compute(cache, [5], tokens + step).isfinite().all()
    assert isinstance(cache, RaggedCache)
    left = cache.stored[0].positions[0]
    length = tokens + 30
    assert left[left >= 0].numel() == length - int(length * 0.8)
    assert left[left >= 0][: min(4, tokens)].tolist() == [*range(min(4, tokens))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    engine = engine_of(dtype=dtype)
    cache = compressed("elastic_cache:share=0.4,rows=16", engine)
    assert isinstance(cache, RaggedCache)
    assert cache.stored[0].values.dtype == dtype
    assert cache.kept_share == pytest.approx(0.4)
    assert engine.compute(cache, [5, 6], 60).isfinite().all()


def test_chunks_that_are_saved() -> None:
    """Without queries: the tokens with the shortest keys are anchors."""
    layer = without_queries(toy(32))
    method = ElasticCache(share=0.5, when="store")
    assert method.at == {"store"}
    [mask] = method.keep([layer])
    assert mask is not None
    kept = mask[0].nonzero().flatten().tolist()
    lengths = layer.keys.norm(dim=-1).mean(0)
    assert kept == sorted([0, 1, 2, 3, 31, *(4 + lengths[4:31].argsort()[:11]).tolist()])
    assert method.merge(layer, mask) is not None


@pytest.mark.parametrize(
    "recipe",
    ["share=0", "share=1.1", "share=nan", "rows=0", "merging=yes", "answering=yes", "distance=0", "when=decode"],
)
def test_refused(recipe: str) -> None:
    with pytest.raises(BadInput, match=f"compress elastic_cache: {recipe.partition('=')[0]} is"):
        method_named(f"elastic_cache:{recipe}")
