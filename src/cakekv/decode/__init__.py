"""What a decode step sees of a cache. One file per sight, a line each in `SIGHTS`."""

from __future__ import annotations

from importlib import import_module

from cakekv.decode.base import Sight
from cakekv.errors import BadInput
from cakekv.recipes import parameters_of

SIGHTS = {
    "whole": "cakekv.decode.whole:Whole",
    "pages": "cakekv.decode.pages:Pages",
    "clusterkv": "cakekv.decode.clusterkv:ClusterKV",
    "less": "cakekv.decode.less:Less",
    "quantspec": "cakekv.decode.quantspec:QuantSpec",
}
"""Module and class by name."""


def sight_named(recipe: str) -> Sight:
    """The sight that a recipe names, such as "clusterkv:budget=512".

    Raises
    ------
    BadInput
        There is no such sight or parameter, or a parameter's value is out of range.
    """
    name, _, rest = recipe.partition(":")
    if name not in SIGHTS:
        raise BadInput(f"unknown way to decode {name!r}: choose one of {', '.join(SIGHTS)}")
    module, _, kind = SIGHTS[name].partition(":")
    sight: type[Sight] = getattr(import_module(module), kind)
    return sight(**parameters_of(sight, rest, f"decode {name}"))
