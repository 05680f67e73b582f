"""How documents are reused, as a recipe says it."""

from __future__ import annotations

import pytest

from cakekv.errors import BadInput
from cakekv.prompt import Place
from cakekv.reuse import reuse_named


@pytest.mark.parametrize(
    ("recipe", "written", "recomputed", "turns"),
    [
        ("epic", "epic:link=16", 16, True),
        ("epic:link=0", "epic:link=0", 0, True),
        ("epic:link=1000", "epic:link=1000", 40, True),
        ("blend", "blend:recompute=0.15,check=1,tensor=values,choice=deviation", 0, True),
        ("blend:tensor=both,recompute=1", "blend:recompute=1.0,check=1,tensor=both,choice=deviation", 0, True),
        ("turned", "turned", 0, True),
        ("naive", "naive", 0, False),
    ],
)
def test_a_recipe_names_a_way(recipe: str, written: str, recomputed: int, turns: bool) -> None:
    reuse = reuse_named(recipe)
    assert reuse.recipe == written
    assert reuse_named(written) == reuse
    assert list(reuse.recomputed(Place(100, 40))) == list(range(100, 100 + recomputed))
    assert reuse.turns is turns


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("blended", "choose one of epic, blend, turned, naive"),
        ("", "choose one of"),
        ("epic:links=3", "it takes link="),
        ("epic:link", "it takes link="),
        ("epic:link=-1", "whole number of 0 or more"),
        ("epic:link=1.5", "whole number of 0 or more"),
        ("epic:link=99999999999", "0 or more tokens"),
        ("turned:turn=yes", "no parameter"),
        ("blend:recompute=1.01", "recompute is 1.01, but must be a share from 0 to 1"),
        ("blend:recompute=nan", "a share from 0 to 1"),
        ("blend:recompute=half", "must be a number"),
        ("blend:check=0", "a whole number of 1 or more"),
        ("blend:check=1.5", "a whole number"),
        ("blend:tensor=queries", "one of values, keys, both"),
        ("blend:choice=best", "one of deviation, random"),
    ],
)
def test_what_is_no_recipe_is_refused_with_what_would_be(recipe: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        reuse_named(recipe)
