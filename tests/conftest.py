"""What all tests share: how long they may take."""

from __future__ import annotations

import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="tests of faults, and fuzzers, at full length")


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether tests that go on as long as they are let shall go on for long."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed: what needs it is imported anew."""
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("packing", "codec.kernels"):
        package, _, module = f"cakekv.{name}".rpartition(".")
        monkeypatch.delitem(sys.modules, f"cakekv.{name}", raising=False)
        monkeypatch.delattr(f"{package}.{module}", raising=False)
