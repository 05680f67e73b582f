"""What a decode step sees of a cache. One file per sight, a line each in `SIGHTS`."""

from __future__ import annotations

from cakekv.decode.base import Sight
from cakekv.recipes import made_by

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
    return made_by(recipe, SIGHTS, "unknown way to decode", "decode")
