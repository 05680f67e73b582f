"""Ways to reuse documents that stand anywhere in a prompt. One file per way, a line each in `WAYS`."""

from __future__ import annotations

from dataclasses import fields

from cakekv.errors import BadInput
from cakekv.reuse.base import Reuse
from cakekv.reuse.epic import Epic, Naive

WAYS: dict[str, type[Reuse]] = {"epic": Epic, "naive": Naive}


def reuse_named(recipe: str) -> Reuse:
    """The way that a recipe names, such as "epic:link=16".

    Raises
    ------
    BadInput
        There is no such way or parameter, or a parameter's value is out of range.
    """
    name, _, rest = recipe.partition(":")
    if name not in WAYS:
        raise BadInput(f"unknown way to reuse documents {name!r}: choose one of {', '.join(WAYS)}")
    defaults = {field.name: field.default for field in fields(WAYS[name])}
    parameters: dict[str, object] = {}
    for option in filter(None, rest.split(",")):
        key, equals, text = option.partition("=")
        if key not in defaults or not equals:
            raise BadInput(f"reuse {name} has no parameter {option!r}: it takes {', '.join(f'{k}=' for k in defaults)}")
        if isinstance(defaults[key], bool):
            if text not in ("yes", "no"):
                raise BadInput(f"reuse {name}: {key} is {text!r}, but must be yes or no")
            parameters[key] = text == "yes"
        elif text.isascii() and text.isdigit():
            parameters[key] = int(text)
        else:
            raise BadInput(f"reuse {name}: {key} is {text!r}, but must be a whole number of 0 or more")
    return WAYS[name](**parameters)
