"""Reads the parameters of a recipe, such as "bits=2,window=128" in "kivi:bits=2,window=128"."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from cakekv.errors import BadInput


def parameters_of(kind: type[Any], said: str, name: str, number: str = "a number") -> dict[str, Any]:
    """The parameters that a recipe gives, each as what its default is: yes or no, a number, or a word.

    Parameters
    ----------
    kind : dataclass
        What the recipe names; its fields are its parameters, each with a default.
    said : str
        The recipe behind its name and colon; may be empty.
    name : str
        What the recipe names, for messages: "codec kivi".
    number : str
        What a value has to be where a whole number is wanted, for messages.

    Raises
    ------
    BadInput
        There is no such parameter, or its value is of another kind.
    """
    defaults = {field.name: field.default for field in fields(kind)}
    parameters: dict[str, Any] = {}
    for option in filter(None, said.split(",")):
        key, equals, text = option.partition("=")
        if key not in defaults or not equals:
            raise BadInput(f"{name} has no parameter {option!r}: it takes {', '.join(f'{k}=' for k in defaults) or 'none'}")
        parameters[key] = _parsed(text, defaults[key], f"{name}: {key}", number)
    return parameters


def _parsed(text: str, default: object, name: str, number: str) -> object:
    if isinstance(default, bool):
        if text not in ("yes", "no"):
            raise BadInput(f"{name} is {text!r}, but must be yes or no")
        return text == "yes"
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError as error:
            wanted = number if isinstance(default, int) else "a number"
            raise BadInput(f"{name} is {text!r}, but must be {wanted}") from error
    return text
