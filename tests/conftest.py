"""What all tests share: how long they may take."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="tests of faults, and fuzzers, at full length")


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether tests that go on as long as they are let shall go on for long."""
    return bool(pytestconfig.getoption("--long"))
