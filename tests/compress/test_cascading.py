"""Cascading KV cache: the rule of acceptance, scores, replay and streaming, and how far back it reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cakekv.compress import method_named
from cakekv.compress.base import Layer
from cakekv.compress.cascading import Cascading
from cakekv.embedded.streaming import take
from cakekv.engine.ragged import RaggedCache
from cakekv.errors import BadInput
from tests.compress.layers import GROUP, HEADS, WIDTH, compressed, engine_of, prompt_of, toy


class Naive:
    """One head, token by token."""

    def __init__(self, method: Cascading) -> None:
        self.method = method
        self.sinks: list[int] = []
        self.cascades: list[list[int]] = [[] for _ in range(method.cascades)]
        self.scores: dict[int, float] = {}
        self.most_sinks = min(method.sinks, method.size // 4)
        self.room = (method.size - self.most_sinks) // method.cascades

    @property
    def left(self) -> list[int]:
        return sorted([*self.sinks, *(token for cascade in self.cascades for token in cascade)])

    def stride(self, layer: Layer, head: int, start: int, end: int) -> None:
        """Attend with the queries of these tokens, whose keys come in, too; then let the tokens in."""
        there, beta = [*self.left, *range(start, end)], self.method.beta
        assert layer.queries is not None
        received = {token: [0.0] * GROUP for token in there}
        for query in range(start, end):
            seen = [token for token in there if token <= query]
            for group in range(GROUP):
                vector = layer.queries[head * GROUP + group, query].float()
                row = (layer.keys[head, seen].float() @ vector * layer.scaling).softmax(0).tolist()
                for token, part in zip(seen, row, strict=True):
                    received[token][group] += (1 - beta) * beta ** (end - 1 - query) * part
        for token in there:
            new = sum(received[token]) / GROUP if self.method.reduce == "mean" else max(received[token])
            self.scores[token] = beta ** (end - start) * self.scores.get(token, 0.0) + new
        for token in range(start, end):
            self.enter(token)

    def enter(self, token: int) -> None:
        if token < self.most_sinks:
            self.sinks.append(token)
            return
        whole = self.room * self.method.cascades
        comes = token
        for number, cascade in enumerate(self.cascades):
            accepts = (token - self.most_sinks) % 2**number == 0 or token <= self.most_sinks + whole
            if accepts and len(cascade) < self.room:
                cascade.append(comes)
                return
            if accepts:
                cascade.append(comes)
                comes = cascade.pop(0)
            elif not cascade:
                cascade.append(comes)
                return
            else:
                if self.scores[comes] >= self.scores[cascade[-1]]:
                    cascade[-1] = comes
                return


def kept_by(method: Cascading, layer: Layer) -> list[list[int]]:
    [mask] = method.keep([layer])
    assert mask is not None
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    "method",
    [
        Cascading(size=24, cascades=3, sinks=4, stride_tokens=7),
        Cascading(size=24, cascades=4, sinks=0, stride_tokens=50, beta=0.9),
        Cascading(size=20, cascades=5, sinks=9, stride_tokens=16, reduce="max"),
        Cascading(size=8, cascades=4, sinks=2, stride_tokens=1, beta=0.9999999),
        Cascading(size=16, cascades=1, sinks=4, stride_tokens=13),
    ],
    ids=str,
)
def test_as_the_paper_has_it(method: Cascading) -> None:
    """Strides over what was left, the rule of acceptance, and then token by token; heads keep different tokens."""
    layer, prompt = toy(150), 120
    naive = [Naive(method) for _ in range(HEADS)]
    for start in range(0, prompt, method.stride_tokens):
        for head in range(HEADS):
            naive[head].stride(layer, head, start, min(start + method.stride_tokens, prompt))
    seen = until(layer, prompt)
    left = kept_by(method, seen)
    assert left == [one.left for one in naive]
    for token in range(prompt, 150):
        left = answered(method, layer, seen.memo, left, token)
        for head in range(HEADS):
            naive[head].stride(layer, head, token, token + 1)
        assert left == [one.left for one in naive]


def until(layer: Layer, end: int) -> Layer:
    """The beginning of a text."""
    assert layer.queries is not None
    assert layer.query_positions is not None
    return replace(
        layer,
        keys=layer.keys[:, :end],
        values=layer.values[:, :end],
        positions=layer.positions[:, :end],
        length=end,
        queries=layer.queries[:, :end],
        query_positions=layer.query_positions[:end],
    )


def answered(
    method: Cascading, layer: Layer, memo: dict[str, Any], left: list[list[int]], token: int
) -> list[list[int]]:
    """What is left once a token came, of which the layer has all."""
    assert layer.queries is not None
    at = torch.tensor([[*row, token] for row in left])
    grown = replace(
        layer,
        keys=layer.keys.gather(1, at[..., None].expand(-1, -1, WIDTH)),
        positions=at,
        length=token + 1,
        queries=layer.queries[:, token : token + 1],
        query_positions=torch.tensor([token]),
        memo=memo,
    )
    kept = method.step(grown)
    assert kept is not None
    return [at[head][kept[head]].tolist() for head in range(HEADS)]


def test_heads_may_share() -> None:
    for shared in (False, True):
        left = kept_by(Cascading(size=24, sinks=4, stride_tokens=16, shared=shared), toy(120))
        assert (left[0] == left[1]) == shared


@pytest.mark.parametrize("last_rows", [0, 8])
@pytest.mark.parametrize("depth", range(140, 340, 23))
def test_a_passkey_outside_the_window(depth: int, last_rows: int) -> None:
    """What all queries look for stays, where a window of the same size has long lost it."""
    layer, at = toy(700), 700 - depth
    assert layer.queries is not None
    layer.queries = layer.queries + 3.0
    layer.keys[:, at] = 2.0
    method = Cascading(size=128, sinks=32, stride_tokens=64, last_rows=last_rows)
    if last_rows:
        layer.queries, layer.query_positions = layer.queries[:, -8:], torch.arange(692, 700)
    [window] = method_named("sink_recent:sinks=32,recent=96").keep([layer])
    assert window is not None
    assert not window[:, at].any()
    assert all(at in left and len(left) == 128 for left in kept_by(method, layer))


def test_how_far_back_it_reaches() -> None:
    """Twice as far with every cascade of that size."""
    layer = toy(1500)
    reach = []
    for cascades in (1, 2, 3, 4):
        [left, _] = kept_by(Cascading(size=32 * cascades + 8, cascades=cascades, sinks=8, stride_tokens=128), layer)
        reach.append(1500 - left[8])
    assert reach == pytest.approx([32, 32 * 3, 32 * 7, 32 * 15], rel=0.03)


def test_nothing_goes_while_there_is_room() -> None:
    """As it fits, a text in strides is what a prefill computes."""
    engine = engine_of()
    prompt = prompt_of(engine, 100)
    method, cache = method_named("cascading:size=128,stride_tokens=32"), None
    for start in range(0, 100, 32):
        cache, logits = take(engine, method, cache, prompt[start : start + 32], start)
    expected = engine.compute(engine.new_cache(100), prompt, 0)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_and_an_answer(dtype: torch.dtype) -> None:
    """The size stays, whatever comes, one token or several."""
    engine = engine_of(dtype=dtype)
    cache = compressed("cascading:size=24,sinks=4,stride_tokens=16", engine)
    assert isinstance(cache, RaggedCache)
    assert [layer.used for layer in cache.stored] == [24] * 3
    position = 60
    for tokens in (1, 1, 9, 1):
        assert engine.compute(cache, [5] * tokens, position).isfinite().all()
        position += tokens
        assert [layer.used for layer in cache.stored] == [24] * 3
        assert [layer.rope_length for layer in cache.stored] == [24] * 3
        assert all(layer.positions[:, -1].tolist() == [position - 1] * HEADS for layer in cache.stored)


def test_a_stream_is_what_a_replay_chooses() -> None:
    """Attention received is the same, as long as nothing goes."""
    engine = engine_of()
    prompt = prompt_of(engine, 120)
    method, cache = method_named("cascading:size=136,stride_tokens=24"), None
    for start in range(0, 120, 24):
        cache, _ = take(engine, method, cache, prompt[start : start + 24], start)
    whole = engine.new_cache(120)
    engine.compute(whole, prompt, 0)
    replayed = engine.compress(whole, prompt, method)
    assert isinstance(replayed, RaggedCache)
    for one, other in zip(cache.stored, replayed.stored, strict=True):
        torch.testing.assert_close(one.memo["cascades"].scores, other.memo["cascades"].scores, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_short_prompts(tokens: int) -> None:
    engine = engine_of()
    cache = compressed("cascading:size=8,cascades=2,stride_tokens=4", engine, tokens)
    assert isinstance(cache, RaggedCache)
    assert cache.stored[0].used == min(tokens, 8)
    for step in range(12):
        assert engine.compute(cache, [5], tokens + step).isfinite().all()
    assert cache.stored[0].used == 8


def test_windows_stay_windows() -> None:
    """Layers with a window keep what it shows, and let go of what it has passed."""
    engine = engine_of("qwen2-mixed")
    cache = compressed("cascading:size=24,sinks=4,stride_tokens=16", engine)
    assert isinstance(cache, RaggedCache)
    for step in range(40):
        engine.compute(cache, [5], 60 + step)
    for layer in cache.stored:
        assert layer.used == (24 if layer.window is None else layer.window - 1)
        assert layer.positions[0, -1] == 99


def test_a_cache_with_holes_is_refused() -> None:
    layer = toy(30)
    layer.positions = layer.positions.clone()
    layer.positions[0, 3] = -1
    with pytest.raises(BadInput, match="combine it with no other method"):
        Cascading().keep([layer])


@pytest.mark.parametrize(
    "recipe",
    [
        *("size=7", "cascades=0", "cascades=33", "sinks=-1", "beta=1", "beta=nan", "stride_tokens=0", "reduce=sum"),
        *("last_rows=-1", "prefill=never"),
    ],
)
def test_refused(recipe: str) -> None:
    with pytest.raises(BadInput, match=f"compress cascading: {recipe.partition('=')[0]} is"):
        method_named(f"cascading:{recipe}")
