"""VL-Cache against its formulas, written down naively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakekv.compress.base import Layer, Marked
from cakekv.compress.vl_cache import VLCache, apportioned
from cakekv.errors import BadInput
from tests.compress import toy

TOKENS = 50
QUESTION = Marked(40, 46, "question")


def layers(rows: int, marked: Sequence[Marked] = (), tokens: int = TOKENS, **options: torch.dtype) -> list[Layer]:
    """Sparse ones and dense ones."""
    return [
        toy.layer(tokens, rows, index, sharpness, marked, **options) for index, sharpness in enumerate([4, 1, 8, 2])
    ]


def naive(layers: Sequence[Layer], method: VLCache, rows: Sequence[int]) -> list[list[list[int]]]:
    """What the heads of every layer keep; `rows` are those looked at, by position."""
    tokens, densities, scores = layers[0].length, [], []
    for layer in layers:
        assert layer.query_positions is not None
        queries = [number for number, at in enumerate(layer.query_positions.tolist()) if at in rows]
        gammas, received = [], [[0.0] * tokens for _ in range(toy.HEADS)]
        for head in range(toy.HEADS * toy.GROUP):
            zeroed = causal = 0
            for query in queries:
                attention = toy.row(layer, head, query)
                causal += len(attention)
                zeroed += sum(share < method.p * max(attention.values()) for share in attention.values())
                for token, share in attention.items():
                    received[head // toy.GROUP][token] += share / toy.GROUP
            gammas.append(zeroed / causal)
        densities.append(1 - sum(gammas) / len(gammas))
        assert method.look(layer)[0] == pytest.approx(densities[-1])
        scores.append(received)
    exact = [density * method.share * len(layers) * tokens / sum(densities) for density in densities]
    assert all(0.01 * tokens <= one <= tokens for one in exact), "nothing to clip"
    budgets = [int(one) for one in exact]
    total = round(method.share * len(layers) * tokens)
    for number in sorted(range(len(exact)), key=lambda number: budgets[number] - exact[number])[: total - sum(budgets)]:
        budgets[number] += 1
    assert sum(budgets) == total
    kept: list[list[list[int]]] = []
    for budget, of_heads in zip(budgets, scores, strict=True):
        recent = round(method.recent * budget)
        kept.append([])
        for scored in of_heads:
            best = sorted(range(tokens - recent), key=scored.__getitem__, reverse=True)[: budget - recent]
            kept[-1].append(sorted([*best, *range(tokens - recent, tokens)]))
    return kept


@pytest.mark.parametrize("share", [0.2, 0.37])
@pytest.mark.parametrize("p", [0.01, 0.2])
@pytest.mark.parametrize(
    ("marked", "rows"),
    [
        ([QUESTION], range(40, 46)),
        ([Marked(3, 43, "image"), Marked(10, 20, "video")], range(43, 50)),
        ([Marked(3, 43, "image"), QUESTION], range(40, 46)),
        ([], range(38, 50)),
        ([Marked(0, 20, "question")], range(38, 50)),
        ([Marked(0, 50, "image")], range(38, 50)),
        ([Marked(5, 50, "question")], range(38, 50)),
    ],
    ids=["question", "after images", "both", "nothing", "a question long ago", "only images", "a long question"],
)
def test_it_keeps_what_its_formulas_say(share: float, p: float, marked: list[Marked], rows: range) -> None:
    method = VLCache(share, p=p, window=12)
    given = layers(method.rows, marked)
    kept = method.keep(given)
    expected = naive(given, method, rows)
    assert [toy.kept_positions(layer, mask) for layer, mask in zip(given, kept, strict=True)] == expected  # type: ignore[arg-type]


def test_rows_of_the_whole_prompt() -> None:
    method = VLCache(0.2, rows_of="prompt", window=12)
    given = layers(method.rows, [QUESTION])
    kept = method.keep(given)
    expected = naive(given, method, range(TOKENS))
    assert [toy.kept_positions(layer, mask) for layer, mask in zip(given, kept, strict=True)] == expected  # type: ignore[arg-type]
    assert expected != naive(given, replace(method, rows_of="question"), range(40, 46)), "the rows matter"


def test_denser_layers_keep_more() -> None:
    counts = [int(kept.sum()) for kept in VLCache(0.2).keep(layers(50)) if kept is not None]
    assert counts[1] > counts[3] > counts[0] > counts[2]
    even = [int(kept.sum()) for kept in VLCache(0.2, p=0.0).keep(layers(50)) if kept is not None]
    assert len(set(even)) == 1


def test_what_a_row_cannot_see_does_not_make_it_sparse() -> None:
    """Rows that look at all they see alike are dense, wherever they are."""
    sparse = toy.layer(TOKENS, TOKENS, sharpness=8.0)
    assert sparse.queries is not None
    even = replace(sparse, index=1, queries=torch.zeros_like(sparse.queries))
    late = replace(even, index=2)
    method = VLCache(0.3, rows_of="prompt")
    kept = method.keep([even, late, sparse])
    assert method.look(even)[0] == 1.0
    one, other, least = (int(mask[0].sum()) for mask in kept if mask is not None)
    assert one == other > least
    assert one + other + least == round(0.3 * 3 * TOKENS)


def test_everything_is_everything() -> None:
    assert VLCache(share=1.0).keep(layers(8)) == [None] * 4
    assert VLCache().keep([]) == []


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_a_short_prompt_keeps_at_least_a_token(tokens: int) -> None:
    for kept in VLCache(0.01).keep(layers(50, tokens=tokens)):
        assert kept is not None
        assert kept.sum(1).tolist() == [1] * toy.HEADS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_looked_at_in_full(dtype: torch.dtype) -> None:
    method = VLCache(0.2, window=12)
    given = layers(method.rows, dtype=dtype)
    expected = naive(given, method, range(38, 50))
    assert [toy.kept_positions(layer, mask) for layer, mask in zip(given, method.keep(given), strict=True)] == expected  # type: ignore[arg-type]


def test_parts_are_in_proportion() -> None:
    assert apportioned([1.0, 1.0, 2.0], 10, 1, 50) == [3, 2, 5]
    assert apportioned([1.0, 3.0, 100.0], 60, 1, 50) == [3, 7, 50]  # 2.5 and 7.5 of what the third cannot have
    assert apportioned([0.001, 1.0, 1.0], 21, 5, 50) == [5, 8, 8]
    assert apportioned([1.0, 1.0], 1, 2, 50) == [2, 2]
    assert apportioned([1.0, 9.0], 99, 1, 7) == [7, 7]


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    share=st.floats(0.0, 1.0),
    least=st.integers(1, 20),
    room=st.integers(0, 5000),
)
def test_parts_have_their_total_and_their_order(weights: list[int], share: float, least: int, room: int) -> None:
    most = least + room
    total = round(share * most * len(weights))
    parts = apportioned([weight / 1000 for weight in weights], total, least, most)
    assert sum(parts) == min(max(total, least * len(weights)), most * len(weights))
    assert all(least <= part <= most for part in parts)
    for (one, its), (other, others) in pairwise(sorted(zip(weights, parts, strict=True))):
        assert its <= others if one < other else others - its <= 1


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"share": 1.1}, {"recent": -0.1}, {"p": 2.0}, {"rows_of": "answer"}, {"window": 0}]
)
def test_parameters_out_of_range_are_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(BadInput, match=f"compress vl_cache: {name} is"):
        VLCache(**wrong)  # type: ignore[arg-type]
