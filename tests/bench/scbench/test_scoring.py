from __future__ import annotations

import pytest

from cakekv.bench.scbench.scoring import contains, contains_all, rouge_l, same_number


def test_containment() -> None:
    assert contains("It is Red.", "red") == 1.0
    assert contains("It is re", "red") == 0.0


def test_all_names_in_any_order() -> None:
    assert contains_all("x2, then x1", ["x1", "x2"]) == 1.0
    assert contains_all("x12", ["x1", "x2"]) == 0.0
    assert contains_all("x1", ["x1", "x2"]) == 0.0


def test_the_first_number_counts() -> None:
    assert same_number("about 12.0, not 13", "12") == 1.0
    assert same_number("121", "12") == 0.0
    assert same_number("none", "12") == 0.0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert rouge_l("the cat sat", "The cat sat.") == 1.0
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman police killed", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("a b", "a c d") == pytest.approx(2 * 1 / 5)
    assert rouge_l("", "a") == 0.0
