"""ClusterKV, and pages, against plain code; and over tiny real models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cakekv import BadInput, Cake
from cakekv.compress.base import Layer
from cakekv.decode import sight_named
from cakekv.decode.clusterkv import ClusterKV
from cakekv.decode.groups import Grouped
from cakekv.decode.kmeans import kmeans
from cakekv.decode.pages import Pages
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import CONTEXT, WINDOW, build

CLUSTERS = "clusterkv:budget=48,sinks=4,tokens=8,window=20,window_clusters=3,full_layers=1"
PAGES = "pages:budget=48,sinks=4,tokens=8,full_layers=1"


def layer_of(length: int, tokens: int, index: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8) -> Layer:
    """With `tokens` queries, the last of `length` entries."""
    generator = torch.Generator().manual_seed(length + tokens)
    keys, values = (torch.randn((kv_heads, length, width), generator=generator) for _ in range(2))
    queries = torch.randn((heads, tokens, width), generator=generator)
    positions = torch.arange(length).repeat(kv_heads, 1)
    return Layer(index, 3, keys, values, positions, length, queries, torch.arange(length - tokens, length))


def plain_kmeans(keys: torch.Tensor, clusters: int, iterations: int) -> list[list[int]]:
    """Labels of each head."""
    generator = torch.Generator().manual_seed(22)
    labels = []
    for head in keys:
        centroids = [head[at] for at in torch.randperm(len(head), generator=generator)[:clusters].tolist()]

        def nearest(centroids: Sequence[torch.Tensor], head: torch.Tensor = head) -> list[int]:
            cosine = [[float(torch.cosine_similarity(key, one, dim=0)) for one in centroids] for key in head]
            return [max(range(clusters), key=row.__getitem__) for row in cosine]

        for _ in range(iterations):
            now = nearest(centroids)
            for cluster in range(clusters):
                own = [key for key, label in zip(head, now, strict=True) if label == cluster]
                if own:
                    centroids[cluster] = torch.stack(own).mean(0)
        labels.append(nearest(centroids))
    return labels


def plain_choice(sight: Grouped, layer: Layer, query: torch.Tensor, head: int, end: int) -> set[int]:
    """What one query sees of entries before `end`, all in groups, and all behind them."""
    keys = layer.keys[head, sight.sinks : end]
    if isinstance(sight, ClusterKV):
        labels = kmeans(layer.keys[:, sight.sinks : end], round(len(keys) / sight.tokens), sight.iterations)[0][head]
        groups = [(labels == cluster).nonzero()[:, 0].tolist() for cluster in range(int(labels.max()) + 1)]
        scores = [float(query @ keys[group].mean(0)) if group else float("-inf") for group in groups]
    else:
        assert isinstance(sight, Pages)
        groups = [list(range(at, min(at + sight.tokens, len(keys)))) for at in range(0, len(keys), sight.tokens)]
        scores = [float(torch.maximum(query * keys[g].amin(0), query * keys[g].amax(0)).sum()) for g in groups]
    seen: list[int] = []
    for group in sorted(range(len(groups)), key=scores.__getitem__, reverse=True):
        seen += groups[group]
    chosen = {at + sight.sinks for at in seen[: sight.budget - sight.sinks]}
    return {*range(sight.sinks), *chosen, *range(end, layer.length)}


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (keys @ query).softmax(0) @ values


def test_kmeans_is_that_of_plain_code() -> None:
    keys = layer_of(60, 1).keys
    labels, centroids = kmeans(keys, 6, 4)
    assert labels.tolist() == plain_kmeans(keys, 6, 4)
    for head, own in enumerate(labels):
        for cluster in own.unique():
            torch.testing.assert_close(centroids[head, cluster], keys[head, own == cluster].mean(0))


def test_kmeans_with_as_many_clusters_as_keys() -> None:
    labels, _ = kmeans(layer_of(5, 1).keys, 5, 3)
    assert [sorted(own) for own in labels.tolist()] == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("recipe", [CLUSTERS, PAGES])
@pytest.mark.parametrize("average", ["no", "yes"])
def test_a_step_sees_what_plain_code_chooses(recipe: str, average: str) -> None:
    sight = sight_named(f"{recipe},average={average}")
    assert isinstance(sight, Grouped)
    layer = layer_of(120, 1)
    assert layer.queries is not None
    keys, values, mask = sight.view(layer, None)
    assert mask is None
    assert keys.shape == (1, 2 if average == "yes" else 4, 48 + 1, 8)
    for number, query in enumerate(layer.queries[:, 0]):
        head = number // 2
        asked = layer.queries[2 * head : 2 * head + 2, 0].mean(0) if average == "yes" else query
        seen = sorted(plain_choice(sight, layer, asked, head, 119))
        at = head if average == "yes" else number
        expected = attention(query, layer.keys[head, seen], layer.values[head, seen])
        torch.testing.assert_close(attention(query, keys[0, at], values[0, at]), expected)


@pytest.mark.parametrize("recipe", [CLUSTERS, PAGES])
def test_several_new_tokens_each_see_their_own(recipe: str) -> None:
    sight = sight_named(recipe.replace("48", "20"))
    assert isinstance(sight, Grouped)
    layer = layer_of(70, 30)
    assert layer.queries is not None
    causal = torch.arange(70) <= torch.arange(40, 70)[:, None]
    for given in (causal[None, None], torch.zeros(1, 1, 30, 70).masked_fill(~causal, float("-inf"))):
        _, _, mask = sight.view(layer, given)
        assert mask is not None
        seen = mask if mask.dtype is torch.bool else mask == 0
        for number in range(4):
            for token in (0, 17, 29):
                query = layer.queries[number, token]
                expected = {one for one in plain_choice(sight, layer, query, number // 2, 40) if one <= 40 + token}
                assert set(seen[0, number, token].nonzero()[:, 0].tolist()) == expected


def test_first_layers_and_short_texts_are_seen_as_a_whole() -> None:
    sight = sight_named(CLUSTERS)
    for layer in (layer_of(120, 1, index=0), layer_of(48, 1)):
        keys, values, mask = sight.view(layer, None)
        assert (keys[0].data_ptr(), values[0].data_ptr(), mask) == (
            layer.keys.data_ptr(),
            layer.values.data_ptr(),
            None,
        )
    assert sight.view(layer_of(49, 1), None).keys.shape[2] == 49


@pytest.mark.parametrize("recipe", [CLUSTERS, PAGES])
def test_every_entry_is_in_one_group_however_long_the_text_grows(recipe: str) -> None:
    sight = sight_named(recipe)
    assert isinstance(sight, Grouped)
    memo: dict[str, Any] = {}
    for length in (60, 61, 75, 90, 112, 140):
        layer = layer_of(length, 1)
        layer.memo = memo
        keys, _, _ = sight.view(layer, None)
        groups = memo["groups"]
        assert length - 1 - groups.end < sight.waits
        assert [sorted(own) for own in groups.order.tolist()] == [list(range(4, groups.end))] * 2
        assert groups.sizes.sum(1).tolist() == [groups.end - 4] * 2
        assert keys.shape[2] == 48 + length - groups.end


def test_a_token_that_one_query_does_not_see_is_seen_by_the_next() -> None:
    sight = sight_named("clusterkv:budget=20,sinks=2,tokens=4,full_layers=0")
    seen: set[int] = set()
    layer = layer_of(100, 1)
    for query in torch.eye(8).repeat(2, 1) * torch.tensor([1.0] * 8 + [-1.0] * 8)[:, None]:
        layer.queries = query.expand(4, 1, 8)
        keys = sight.view(layer, None).keys[0, 0]
        seen |= {at for at, key in enumerate(layer.keys[0]) if (keys == key).all(1).any()}
    assert seen == set(range(100))


def ids_of(engine: TransformersEngine, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, engine.vocabulary_size, (tokens,), generator=generator).tolist()


def looked(engine: TransformersEngine, token_ids: list[int], recipe: str) -> Any:
    cache = engine.new_cache(len(token_ids))
    engine.compute(cache, token_ids, 0)
    return engine.look(cache, token_ids, sight_named(recipe))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "qwen2-mixed"])
def test_with_the_budget_for_all_logits_are_the_ordinary_ones_to_the_bit(name: str) -> None:
    engine = TransformersEngine(build(name))
    token_ids = ids_of(engine, 90)
    ours, ordinary = (looked(engine, token_ids, one) for one in ("clusterkv:budget=200,full_layers=0", "whole"))
    for position in range(90, 96):
        assert torch.equal(engine.compute(ours, [position], position), engine.compute(ordinary, [position], position))


@pytest.mark.parametrize("recipe", [CLUSTERS, PAGES])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "gpt2", "phi"])
def test_a_step_by_mask_is_a_step_by_gathering(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(build(name))
    token_ids = ids_of(engine, 120)
    gathered = engine.compute(looked(engine, token_ids, recipe), [5], 120)
    view = Grouped.view
    monkeypatch.setattr(
        Grouped, "view", lambda self, layer, mask: view(self, layer, torch.ones(1, 1, 1, layer.length).bool())
    )
    masked = engine.compute(looked(engine, token_ids, recipe), [5], 120)
    whole = engine.compute(looked(engine, token_ids, "whole"), [5], 120)
    torch.testing.assert_close(gathered, masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gathered, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    engine = TransformersEngine(build("llama").to(dtype))
    token_ids = ids_of(engine, 120)
    ours, whole = (
        engine.compute(looked(engine, token_ids, one), [5], 120)
        for one in (f"{CLUSTERS.replace('48', '118')}", "whole")
    )
    assert ours.isfinite().all()
    assert float((ours - whole).norm() / whole.norm()) < 0.1


def test_layers_with_a_window_see_what_they_see() -> None:
    engine = TransformersEngine(build("mistral"))
    assert engine.layout.window == WINDOW
    token_ids = ids_of(engine, 120)
    ours, whole = (looked(engine, token_ids, one) for one in (CLUSTERS.replace("48", "20"), "whole"))
    assert torch.equal(engine.compute(ours, [5], 120), engine.compute(whole, [5], 120))


def test_a_failed_step_leaves_groups_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(build("llama"))
    token_ids = ids_of(engine, 120)
    ours, other = (looked(engine, token_ids, CLUSTERS) for _ in range(2))
    for position in range(120, 145):  # new tokens were put into clusters meanwhile
        engine.compute(other, [position % 100], position)
        if position == 140:
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.Linear, "forward", _fails_at_last(engine))
                with pytest.raises(RuntimeError, match="broken"):
                    engine.compute(ours, [99], position)
        engine.compute(ours, [position % 100], position)
    assert torch.equal(engine.compute(ours, [7], 145), engine.compute(other, [7], 145))


def _fails_at_last(engine: TransformersEngine) -> Any:
    forward = torch.nn.Linear.forward

    def failing(self: torch.nn.Linear, given: torch.Tensor) -> torch.Tensor:
        if self.out_features == engine.vocabulary_size:
            raise RuntimeError("broken")
        return forward(self, given)

    return failing


def test_a_cake_answers_with_it_for_long() -> None:
    engine = TransformersEngine(build("llama"))
    engine.stop_tokens = frozenset()
    prompt = ids_of(engine, 80)
    room = CONTEXT - 80
    with Cake(engine, None, decode="clusterkv:budget=64,tokens=8,window=20,window_clusters=3") as cake:
        answer = cake.generate(prompt, max_new_tokens=room)
        assert len(answer.token_ids) == room
        assert answer.report.decode is not None
        assert answer.report.decode.startswith("clusterkv:budget=64,")
        assert answer.report.kept_share == 1.0
    with Cake(engine, None, decode="clusterkv:budget=300") as cake:
        exact = cake.generate(prompt, max_new_tokens=room)
    with Cake(engine, None) as cake:
        assert exact.token_ids == cake.generate(prompt, max_new_tokens=room).token_ids
    assert answer.token_ids[0] == exact.token_ids[0]


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("clusterkv:budget=16", "budget is 16, but must be more than the 16 sinks"),
        ("clusterkv:sinks=-1", "sinks is -1"),
        ("clusterkv:tokens=0", "tokens is 0"),
        ("clusterkv:window=3", "window_clusters is 4, but must be 1 to window"),
        ("clusterkv:iterations=0", "iterations is 0"),
        ("clusterkv:average=maybe", "must be yes or no"),
        ("clusterkv:clusters=5", "no parameter 'clusters=5'"),
        ("pages:tokens=0", "tokens is 0"),
    ],
)
def test_what_it_cannot_be_told(recipe: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        sight_named(recipe)
