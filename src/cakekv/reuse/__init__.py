"""Ways to reuse documents that stand anywhere in a prompt. One file per way, a line each in `WAYS`."""

from __future__ import annotations

from cakekv.recipes import made_by
from cakekv.reuse.base import Reuse
from cakekv.reuse.blend import Blend
from cakekv.reuse.epic import Epic, Naive, Turned

WAYS: dict[str, type[Reuse]] = {"epic": Epic, "blend": Blend, "turned": Turned, "naive": Naive}


def reuse_named(recipe: str) -> Reuse:
    """The way that a recipe names, such as "epic:link=16".

    Raises
    ------
    BadInput
        There is no such way or parameter, or a parameter's value is out of range.
    """
    number = "a whole number of 0 or more"
    return made_by(recipe, WAYS, "unknown way to reuse documents", "reuse", number)
