"""The public names: those that docs/api.md lists, each with its documentation; old ones still work, with a warning."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import cakekv
from cakekv import errors
from cakekv.exports import exporting

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def listed() -> list[str]:
    """The names in the first columns of the tables of docs/api.md."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_what_is_exported_is_what_is_documented() -> None:
    assert sorted(listed()) == sorted(cakekv.__all__)


def test_all_errors_are_exported() -> None:
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert defined <= set(cakekv.__all__)


@pytest.mark.parametrize("name", cakekv.__all__)
def test_each_says_what_it_is(name: str) -> None:
    assert (inspect.getdoc(getattr(cakekv, name)) or "").strip()


def test_names_can_be_listed() -> None:
    assert set(cakekv.__all__) <= set(dir(cakekv))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_import_is_there(page: Path) -> None:
    for module, names in re.findall(r"^ *from (cakekv[\w.]*) import ([\w, ]+)", page.read_text(), re.MULTILINE):
        for name in names.split(","):
            source = f"from {module} import {name.strip()}"
            if "shortest_first" not in source:  # which the reader of adding.md writes
                exec(source)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package that exports `Cake` of cakekv, which was once called `Pie`."""
    package, home = ModuleType("pastry"), ModuleType("pastry.oven")
    package.__getattr__ = exporting("pastry", {"Cake": "oven"}, {"Pie": "Cake"})
    home.Cake = cakekv.Cake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pastry", package)
    monkeypatch.setitem(sys.modules, "pastry.oven", home)
    return package


def test_an_old_name_works_and_warns_where_it_is_used(package: ModuleType) -> None:
    with pytest.warns(DeprecationWarning, match=r"pastry\.Pie is called pastry\.Cake now") as caught:
        assert package.Pie is cakekv.Cake
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert package.Cake is cakekv.Cake
    with pytest.raises(AttributeError, match="module 'pastry' has no attribute 'Tart'"):
        _ = package.Tart
