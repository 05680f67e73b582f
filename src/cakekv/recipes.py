"""Recipes: a name with parameters, such as "kivi:bits=2,window=128"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from cakekv.errors import BadInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind")


def recipe_of(name: str, one: DataclassInstance) -> str:
    """The recipe of what has this name, and its fields as parameters."""
    said = {True: "yes", False: "no"}
    options = ",".join(
        f"{field}={said[value] if isinstance(value, bool) else value}" for field, value in asdict(one).items()
    )
    return f"{name}:{options}" if options else name


def made_by(
    recipe: str, kinds: Mapping[str, str | type[Kind]], unknown: str, prefix: str, number: str = "a number"
) -> Kind:
    """What a recipe names, with its parameters.

    Parameters
    ----------
    recipe : str
        Such as "kivi:bits=2,window=128".
    kinds : mapping
        Dataclasses by name; or where they are, as "module:class", to be imported only if they are named.
    unknown : str
        What a name is called that there is not: "unknown codec".
    prefix : str
        Stands before names in messages about parameters: "codec".
    number : str
        As for `parameters_of`.

    Raises
    ------
    BadInput
        There is no such name or parameter, or a parameter's value is out of range.
    """
    name, _, rest = recipe.partition(":")
    if name not in kinds:
        raise BadInput(f"{unknown} {name!r}: choose one of {', '.join(kinds)}")
    found = kinds[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        kind: type[Kind] = getattr(import_module(module), attribute)
    else:
        kind = found
    return kind(**parameters_of(kind, rest, f"{prefix} {name}", number))


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
            takes = ", ".join(f"{known}=" for known in defaults) or "none"
            raise BadInput(f"{name} has no parameter {option!r}: it takes {takes}")
        if key in parameters:
            raise BadInput(f"{name}: {key} is given twice: leave one out")
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
