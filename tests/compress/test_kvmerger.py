"""KVMerger: sets by the chain rule, pivots, Gaussian weights, and what is left as it is."""

from __future__ import annotations

import math

import pytest
import torch

from cakekv.compress import method_named
from cakekv.compress.base import Layer
from cakekv.compress.kvmerger import KVMerger
from cakekv.engine.ragged import RaggedCache
from cakekv.errors import BadInput
from tests.compress.layers import HEADS, WIDTH, complete, compressed, engine_of, prompt_of, toy, without_queries


def alike(length: int, **more: object) -> Layer:
    """Keys that drift, so that neighbours are alike and more distant ones are less so."""
    layer = toy(length, **more)  # type: ignore[arg-type]
    layer.keys = (0.45 * layer.keys.float()).cumsum(1).to(layer.keys.dtype)
    return layer


def expected(layer: Layer, head: int, method: KVMerger) -> list[list[int]]:
    """The sets of a head with more than one token, by the paper, the pivot of each first."""
    tokens, keys = layer.length, layer.keys[head].float()
    received = layer.attention()[head].sum(1).mean(0).tolist()
    recent = round(method.recent * tokens)
    heavy = sorted(range(tokens - recent), key=lambda token: -received[token])[: round(method.heavy * tokens)]
    free = set(range(tokens - recent)) - set(heavy)
    sets: list[list[int]] = []
    token = tokens - 1
    while token >= 0:
        one = [token]
        while {token, token - 1} <= free and torch.cosine_similarity(keys[token], keys[token - 1], 0) > method.epsilon:
            token -= 1
            one.append(token)
        token -= 1
        if len(one) > 1:
            pivot = max(one, key=lambda member: received[member])
            sets.append([pivot, *(member for member in one if member != pivot)])
    return sets


@pytest.mark.parametrize("values", ["scaled", "weighted", "biased"])
@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_as_the_paper_has_it(values: str, sigma: float) -> None:
    layer = alike(80)
    method = KVMerger(epsilon=0.7, values=values, sigma=sigma)
    [mask] = method.keep([layer])
    assert mask is not None
    merged = method.merge(layer, mask)
    assert merged is not None
    found = 0
    for head in range(HEADS):
        sets = expected(layer, head, method)
        found += max(len(one) for one in sets) > 3
        gone = {token for one in sets for token in one[1:]}
        assert mask[head].nonzero().flatten().tolist() == [token for token in range(80) if token not in gone]
        for one in sets:
            keys, rows, size = layer.keys[head, one], layer.values[head, one], len(one)
            away = (keys - keys[0]).square().sum(1)
            two_squares = 2 * (sigma**2 if sigma else float(away[1:].mean()))
            weights = torch.exp(-away / two_squares)
            weights /= weights.sum()
            torch.testing.assert_close(merged.keys[head, one[0]], weights @ keys)
            factor = size if values == "scaled" else 1
            torch.testing.assert_close(merged.values[head, one[0]], factor * (weights @ rows))
            if merged.bias is not None:
                assert float(merged.bias[head, one[0]]) == pytest.approx(math.log(size))
        alone = [token for token in range(80) if token not in {token for one in sets for token in one}]
        torch.testing.assert_close(merged.keys[head, alone], layer.keys[head, alone])
        torch.testing.assert_close(merged.values[head, alone], layer.values[head, alone])
    assert found, "some sets are chains"
    assert (merged.bias is not None) == (values == "biased")


def test_tokens_that_are_the_same() -> None:
    """Merged with the logarithm of their number as a bias, they are attended to as before."""
    layer = toy(40, rows=6)
    layer.keys[:, 10:20], layer.values[:, 10:20] = layer.keys[:, 10:11].clone(), layer.values[:, 10:11].clone()
    method = KVMerger(epsilon=0.999, values="biased", heavy=0.0)
    [mask] = method.keep([layer])
    assert mask is not None
    assert mask.sum(1).tolist() == [31] * HEADS
    merged = method.merge(layer, mask)
    assert merged is not None
    before = layer.attention() @ layer.values[:, None]
    left = Layer(**{**vars(layer), "keys": merged.keys, "values": merged.values, "bias": merged.bias})
    left.positions = layer.positions.masked_fill(~mask, -1)
    torch.testing.assert_close(left.attention() @ left.values[:, None], before)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.8])
def test_a_share_of_each_layer(share: float) -> None:
    """As many neighbours join as are needed, the most alike first; all of them if that is not enough."""
    layer = alike(90)
    [mask] = KVMerger(share=share).keep([layer])
    assert mask is not None
    assert int(mask.sum()) == pytest.approx(share * mask.numel(), abs=1)
    [most] = KVMerger(share=0.01).keep([layer])
    [any_alike] = KVMerger(epsilon=-1.0).keep([layer])
    assert most is not None
    assert any_alike is not None
    assert torch.equal(most, any_alike)


def test_not_merging_drops_the_same_tokens() -> None:
    layer = alike(80)
    masks = [KVMerger(merging=merging).keep([layer])[0] for merging in (True, False)]
    assert masks[0] is not None
    assert masks[1] is not None
    assert torch.equal(masks[0], masks[1])
    assert KVMerger(merging=False).merge(layer, masks[0]) is None


def test_layers_at_both_ends() -> None:
    layers = [alike(60, index=index) for index in range(6)]
    kept = KVMerger(first_layers=2, last_layers=1).keep(layers)
    assert [one is None for one in kept] == [True, True, False, False, False, True]


def test_holes_end_sets() -> None:
    """Tokens that are not neighbours in the text are in different sets, however alike."""
    layer = toy(20)
    layer.keys = torch.ones_like(layer.keys)
    layer.positions = layer.positions + (layer.positions >= 10)
    layer.length = 21
    [mask] = KVMerger(recent=0.0, heavy=0.0).keep([layer])
    assert mask is not None
    assert mask.sum(1).tolist() == [2] * HEADS


def test_chunks_that_are_saved() -> None:
    """Without queries: heavy ones and pivots have short keys, nothing is recent; merging needs no memory of keeping."""
    layer = without_queries(alike(64))
    method = KVMerger(when="store", share=0.5)
    assert method.at == {"store"}
    [mask] = method.keep([layer])
    assert mask is not None
    assert int(mask.sum()) == 64
    heavy = layer.keys.norm(dim=-1).argsort(1)[:, : round(0.12 * 64)]
    assert mask.gather(1, heavy).all()
    merged = method.merge(layer, mask)
    again = method.merge(without_queries(alike(64)), mask)
    assert merged is not None
    assert again is not None
    assert torch.equal(merged.keys, again.keys)


def test_several_stores_add_up() -> None:
    """What stands for several tokens already counts as these."""
    layer = toy(4)
    layer.keys, layer.bias = torch.ones(HEADS, 4, WIDTH), torch.tensor([[math.log(2.0), 0, 0, 0]] * HEADS)
    method = KVMerger(recent=0.0, heavy=0.0, values="biased")
    [mask] = method.keep([layer])
    assert mask is not None
    merged = method.merge(layer, mask)
    assert merged is not None
    assert merged.bias is not None
    assert merged.bias[mask].tolist() == pytest.approx([math.log(5)] * HEADS)


MODEL = "first_layers=0,last_layers=0"


def test_a_real_model() -> None:
    engine = engine_of()
    cache = compressed(f"kvmerger:share=0.6,values=biased,{MODEL}", engine)
    assert isinstance(cache, RaggedCache)
    assert cache.kept_share == pytest.approx(0.6, abs=0.01)
    assert all(layer.bias is not None for layer in cache.stored)
    several = engine.compute(cache, [5, 6, 7], 60)
    other = compressed(f"kvmerger:share=0.6,values=biased,{MODEL}", engine)
    for step, token in enumerate([5, 6, 7]):
        one_by_one = engine.compute(other, [token], 60 + step)
    torch.testing.assert_close(several, one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [f"share=1,{MODEL}", f"epsilon=1,{MODEL}", "epsilon=-1,first_layers=3"])
def test_keeping_all_is_the_same_cache(recipe: str) -> None:
    engine = engine_of()
    cache = complete(engine, 40)
    assert engine.compress(cache, prompt_of(engine, 40), method_named(f"kvmerger:{recipe}")) is cache


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_prompts(tokens: int) -> None:
    engine = engine_of()
    cache = compressed(f"kvmerger:epsilon=-1,recent=0,heavy=0,{MODEL}", engine, tokens)
    assert engine.compute(cache, [5], tokens).isfinite().all()
    assert isinstance(cache, RaggedCache) == (tokens > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    engine = engine_of(dtype=dtype)
    cache = compressed(f"kvmerger:share=0.5,rows=16,{MODEL}", engine)
    assert isinstance(cache, RaggedCache)
    assert cache.stored[0].values.dtype == dtype
    assert engine.compute(cache, [5, 6], 60).isfinite().all()


@pytest.mark.parametrize(
    "recipe",
    [
        *("epsilon=1.5", "epsilon=nan", "share=2", "recent=-1", "heavy=2", "rows=0", "sigma=-1", "sigma=inf"),
        *("values=any", "first_layers=-1", "last_layers=-1", "when=decode"),
    ],
)
def test_refused(recipe: str) -> None:
    with pytest.raises(BadInput, match=f"compress kvmerger: {recipe.partition('=')[0]} is"):
        method_named(f"kvmerger:{recipe}")
