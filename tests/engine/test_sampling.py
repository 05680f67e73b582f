from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from cakekv.engine.sampling import choose_token
from cakekv.errors import BadInput

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def drawn(**settings: Any) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(choose_token(LOGITS, generator=generator, **settings) for _ in range(2000))


def test_greedy_takes_the_most_probable() -> None:
    assert choose_token(LOGITS) == 0


def test_sampling_follows_the_probabilities() -> None:
    counts = drawn(temperature=1.0)
    for token, probability in enumerate(LOGITS.exp().tolist()):
        assert counts[token] / 2000 == pytest.approx(probability, abs=0.05)


def test_temperature_sharpens() -> None:
    assert drawn(temperature=0.3)[0] > drawn(temperature=1.0)[0] > drawn(temperature=3.0)[0]


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(drawn(temperature=1.0, top_k=2)) == {0, 2}
    assert set(drawn(temperature=1.0, top_p=0.7)) == {0, 2}
    assert set(drawn(temperature=1.0, top_p=0.01)) == {0}
    assert set(drawn(temperature=1.0, top_k=100, top_p=1.0)) == {0, 1, 2, 3}


def test_a_seed_repeats_itself() -> None:
    assert drawn(temperature=1.0) == drawn(temperature=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": "1"}, "top_p"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        choose_token(LOGITS, **settings)


def test_damaged_logits() -> None:
    with pytest.raises(BadInput, match="NaN"):
        choose_token(torch.tensor([0.0, float("nan")]))
    with pytest.raises(BadInput, match="shape"):
        choose_token(torch.zeros(1, 4))
    with pytest.raises(BadInput, match="infinity"):
        choose_token(torch.tensor([0.0, float("inf")]), temperature=1.0)
    with pytest.raises(BadInput, match="infinity"):
        choose_token(torch.full((3,), -float("inf")), temperature=1.0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 1e-300])
def test_however_low_the_temperature_is(temperature: float) -> None:
    assert set(drawn(temperature=temperature)) == {0}


def test_tokens_that_are_ruled_out_are_never_drawn_and_k_may_exceed_the_vocabulary() -> None:
    logits = torch.tensor([0.0, -float("inf"), 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {choose_token(logits, 1.0, top_k=10**30, generator=generator) for _ in range(100)} == {0, 2}
