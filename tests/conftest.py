"""What all tests share: how long they may take, and a cache of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from cakekv.calibration import cache_folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="tests of faults, and fuzzers, at full length")


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether tests that go on as long as they are let shall go on for long."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that this machine's user has measured or learned decides a test; only models are not made anew."""
    models, folder = cache_folder() / "models", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAKEKV_CACHE", str(folder))
        yield


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed: what needs it is imported anew."""
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("packing", "codec.kernels"):
        package, _, module = f"cakekv.{name}".rpartition(".")
        monkeypatch.delitem(sys.modules, f"cakekv.{name}", raising=False)
        monkeypatch.delattr(f"{package}.{module}", raising=False)
