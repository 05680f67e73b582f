"""A package's public names, each imported when it is asked for, and the old names of those that were renamed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exporting(package: str, homes: Mapping[str, str], renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package's `__getattr__`.

    Parameters
    ----------
    package : str
        Its `__name__`.
    homes : mapping of str to str
        The module of each public name, below the package.
    renamed : mapping of str to str
        Public names of earlier versions, each with its new name: they work, with a `DeprecationWarning`.
    """

    def get(name: str) -> Any:
        if name in renamed:
            new = renamed[name]
            warnings.warn(f"{package}.{name} is called {package}.{new} now", DeprecationWarning, stacklevel=2)
            name = new
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get
