"""DBudgetKV against its formula, written down naively."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cakekv.compress.base import Layer
from cakekv.compress.dbudgetkv import DBudgetKV
from cakekv.errors import BadInput
from tests.compress import toy

PLAIN = DBudgetKV(min_recent=0, exempt=0)


def naive(layer: Layer, method: DBudgetKV) -> list[list[int]]:
    """What each head of keys keeps."""
    tokens, rows = layer.length, len(layer.query_positions)  # type: ignore[arg-type]
    heads = toy.HEADS * toy.GROUP
    attention = []
    for head in range(heads):
        of_rows = [toy.row(layer, head, query) for query in range(rows)]
        attention.append([sum(one.get(token, 0.0) for one in of_rows) / rows for token in range(tokens)])
    sinks = list(range(min(method.sinks, tokens)))
    rankings = []
    for head in range(toy.HEADS):
        own = attention[head * toy.GROUP : (head + 1) * toy.GROUP]
        rest = sorted(
            range(len(sinks), tokens),
            key=lambda token: -token if method.order == "position" else -sum(one[token] for one in own),
        )
        rankings.append(sinks + rest)

    def norm(count: int) -> float:
        return (
            sum(
                math.sqrt(sum(attention[head][token] ** 2 for token in rankings[head // toy.GROUP][:count]))
                for head in range(heads)
            )
            / heads
        )

    base = norm(tokens)
    count = next(count for count in range(1, tokens + 1) if (base - norm(count)) / base <= method.threshold)
    recent = set(range(max(0, tokens - method.min_recent), tokens))
    return [sorted({*ranking[:count], *recent}) for ranking in rankings]


@pytest.mark.parametrize("order", ["position", "attention"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("min_recent", [0, 5])
@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_it_keeps_what_its_formula_says(order: str, rows: int, min_recent: int, threshold: float) -> None:
    method = replace(PLAIN, order=order, rows=rows, min_recent=min_recent, threshold=threshold)
    counts = set()
    for index in range(6):
        layer = toy.layer(40, rows, index, sharpness=1.0 + 2.0 * index)
        (kept,) = method.keep([layer])
        assert kept is not None
        assert toy.kept_positions(layer, kept) == naive(layer, method)
        counts.add(int(kept[0].sum()))
    assert len(counts) > 1, "the budget varies with the text"


def test_where_attention_rests_on_the_first_token_the_plain_rule_keeps_only_that() -> None:
    layer = toy.layer(40, 1)
    assert layer.queries is not None
    keys = layer.keys.clone()
    keys[:, 0] = 50 * layer.queries[:: toy.GROUP, 0]
    layer = replace(layer, keys=keys, queries=layer.queries[:: toy.GROUP].repeat_interleave(toy.GROUP, 0))
    (kept,) = PLAIN.keep([layer])
    assert kept is not None
    assert toy.kept_positions(layer, kept) == [[0]] * toy.HEADS
    (kept,) = replace(PLAIN, min_recent=6).keep([layer])
    assert kept is not None
    assert toy.kept_positions(layer, kept) == [[0, *range(34, 40)]] * toy.HEADS


def test_the_first_layers_keep_everything() -> None:
    kept = DBudgetKV(min_recent=0, threshold=0.5).keep([toy.layer(40, 1, index) for index in range(4)])
    assert [mask is None for mask in kept] == [True, True, False, False]
    assert all(mask is None or not bool(mask.all()) for mask in kept)


def test_a_threshold_of_0_keeps_everything() -> None:
    assert DBudgetKV(threshold=0.0, exempt=0).keep([toy.layer(40, 1, sharpness=200.0)]) == [None]


@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
@pytest.mark.parametrize("order", ["position", "attention"])
def test_prompts_shorter_than_the_minima(tokens: int, order: str) -> None:
    layer = toy.layer(tokens, 8)
    (kept,) = DBudgetKV(exempt=0, rows=8, order=order).keep([layer])
    assert kept is not None
    assert bool(kept.all())
    (kept,) = replace(PLAIN, rows=8, order=order).keep([layer])
    assert kept is not None
    assert toy.kept_positions(layer, kept) == naive(layer, replace(PLAIN, rows=8, order=order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_looked_at_in_full(dtype: torch.dtype) -> None:
    layer = toy.layer(40, 1, dtype=dtype)
    (kept,) = PLAIN.keep([layer])
    assert kept is not None
    assert toy.kept_positions(layer, kept) == naive(layer, PLAIN)


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.0}, {"threshold": -0.1}, {"sinks": -1}, {"rows": 0}, {"order": "age"}, {"exempt": -1}]
)
def test_parameters_out_of_range_are_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(BadInput, match=f"compress dbudgetkv: {name} is"):
        DBudgetKV(**wrong)  # type: ignore[arg-type]
