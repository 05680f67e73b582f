"""CORM against a loop over rows of attention, on a toy and in a model."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch

from cakekv.compress.base import Layer
from cakekv.compress.corm import Corm
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from tests.compress import toy
from tests.matrix.models import build


class Naive:
    """A ring of rows of flags per head of keys, and what is left."""

    def __init__(self, method: Corm, tokens: int) -> None:
        self.method = method
        self.rings: list[deque[set[int]]] = [deque(maxlen=method.window) for _ in range(toy.HEADS)]
        self.left = [list(range(tokens)) for _ in range(toy.HEADS)]

    def look(self, layer: Layer, query: int) -> None:
        for head, ring in enumerate(self.rings):
            rows = [toy.row(layer, head * toy.GROUP + one, query, self.left[head]) for one in range(toy.GROUP)]
            least = 1 / len(rows[0])
            if self.method.union:
                ring.append({token for row in rows for token, share in row.items() if share >= least})
            else:
                ring.append({token for token in rows[0] if sum(row[token] for row in rows) / toy.GROUP >= least})

    def evict(self, tokens: int) -> list[list[int]]:
        self.left = [
            [token for token in left if token >= tokens - self.method.recent or any(token in row for row in ring)]
            for left, ring in zip(self.left, self.rings, strict=True)
        ]
        return self.left


@pytest.mark.parametrize("union", [True, False])
@pytest.mark.parametrize("window", [1, 6, 300])
def test_it_keeps_what_the_last_queries_found_important(union: bool, window: int) -> None:
    method = Corm(window, 4, union)
    layer = toy.layer(150, window)
    naive = Naive(method, 150)
    for query in range(min(window, 150)):
        naive.look(layer, query)
    (kept,) = method.keep([layer])
    assert kept is not None
    assert toy.kept_positions(layer, kept) == naive.evict(150)
    assert window == 300 or not bool(kept.all())


@pytest.mark.parametrize("hides", [True, False], ids=["hidden", "moved together"])
@pytest.mark.parametrize("union", [True, False])
def test_a_step_is_that_of_a_loop_over_rows(union: bool, hides: bool) -> None:
    method = Corm(6, 4, union)
    tokens, whole = 30, 60
    everything = toy.layer(whole, whole)
    assert everything.queries is not None

    def at(length: int, left: list[list[int]], rows: int, memo: dict[str, Any]) -> Layer:
        """The sequence once it has `length` tokens, of which these are left."""
        positions = torch.arange(length).repeat(toy.HEADS, 1)
        for head in range(toy.HEADS):
            there = torch.zeros(length, dtype=torch.bool)
            there[left[head]] = True
            positions[head].masked_fill_(~there, -1)
        keys, values = everything.keys[:, :length], everything.values[:, :length]
        if not hides:
            columns = max(map(len, left))
            order = (positions >= 0).to(torch.int8).argsort(dim=1, stable=True)[:, length - columns :]
            positions = positions.gather(1, order)
            keys, values = (one.gather(1, order[..., None].expand(-1, -1, toy.WIDTH)) for one in (keys, values))
        part = slice(length - rows, length)
        queries = everything.queries[:, part]  # type: ignore[index]
        return Layer(0, 1, keys, values, positions, length, queries, torch.arange(part.start, part.stop),
                     toy.SCALING, memo=memo)  # fmt: skip

    naive, memo = Naive(method, tokens), dict[str, Any]()
    layer = at(tokens, naive.left, 6, memo)
    for query in range(6):
        naive.look(layer, query)
    (kept,) = method.keep([layer])
    assert kept is not None
    assert toy.kept_positions(layer, kept) == naive.evict(tokens)
    gone = 0
    for length in range(tokens + 1, whole + 1):
        before = sum(map(len, naive.left))
        naive.left = [[*left, length - 1] for left in naive.left]
        layer = at(length, naive.left, 1, memo)
        naive.look(layer, 0)
        kept = method.step(layer)
        assert kept is not None
        assert toy.kept_positions(layer, kept) == naive.evict(length)
        gone += before + toy.HEADS - sum(map(len, naive.left))
    assert gone, "something was let go of while the answer grew"


def test_a_layer_that_was_not_chosen_from_is_left_alone() -> None:
    assert Corm().step(toy.layer(40, 1)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_answer_of_a_model_is_bounded(dtype: torch.dtype) -> None:
    engine = TransformersEngine(build("llama", dtype))
    prompt = [(7 * token + 3) % engine.vocabulary_size for token in range(40)]
    cache = engine.new_cache(len(prompt))
    logits = engine.compute(cache, prompt, 0)
    method = Corm(4, 4)
    left = engine.compress(cache, prompt, method)
    for position in range(len(prompt), 240):
        logits = engine.compute(left, [int(logits.argmax())], position)
        assert bool(logits.isfinite().all())
    for layer in left.stored:
        positions, last = layer.positions, layer.memo["important"]
        there = positions >= 0
        flagged = last.gather(1, positions.clamp_min(0)) > left.length - 1 - method.window
        assert bool((there <= (flagged | (positions >= left.length - method.recent))).all())
        assert bool((positions[:, -4:] == torch.arange(236, 240)).all())
    assert left.kept_share < 0.9


def test_what_was_generated_in_steps_is_a_loop_over_complete_rows_of_a_model() -> None:
    """Steps of a model let go of what its rows say, whether entries have moved since or not."""
    engine = TransformersEngine(build("llama"))
    prompt = [(11 * token + 5) % engine.vocabulary_size for token in range(48)]
    cache = engine.new_cache(len(prompt))
    engine.compute(cache, prompt, 0)
    seen: list[tuple[Layer, torch.Tensor, torch.Tensor]] = []

    class Noting(Corm):
        def step(self, layer: Layer) -> torch.Tensor | None:
            kept = super().step(layer)
            assert kept is not None
            seen.append((replace(layer, positions=layer.positions.clone()), layer.attention().amax(1), kept.clone()))
            return kept

    left = engine.compress(cache, prompt, Noting(3, 2))
    for position in range(48, 60):
        engine.compute(left, [position % engine.vocabulary_size], position)
    numbers = len(left.stored)
    for number in range(numbers):
        steps = seen[number::numbers]
        for now in range(3, len(steps)):
            layer, _, kept = steps[now]
            for head in range(layer.heads):
                flagged: set[int] = set()
                for before, shares, _ in steps[now - 2 : now + 1]:
                    there = before.present[head]
                    important = there & (shares[head, -1] >= 1 / there.sum())
                    flagged |= set(before.positions[head][important].tolist())
                expected = [
                    position
                    for position in layer.positions[head][layer.present[head]].tolist()
                    if position >= layer.length - 2 or position in flagged
                ]
                assert layer.positions[head][kept[head] & layer.present[head]].tolist() == expected


@pytest.mark.parametrize("wrong", [{"window": 0}, {"recent": 0}])
def test_parameters_out_of_range_are_named(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(BadInput, match=f"compress corm: {name} is 0"):
        Corm(**wrong)  # type: ignore[arg-type]
