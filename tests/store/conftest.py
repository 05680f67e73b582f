"""Servers that many tests share: started when the first one asks, ended with the session."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property

import pytest

from . import servers


class Servers:
    """What runs beside the tests."""

    def __init__(self, folder, stack):
        self._folder = folder
        self._stack = stack

    @cached_property
    def valkey(self) -> int:
        """The port of a Valkey server."""
        return self._stack.enter_context(servers.valkey(self._folder))[0]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    with ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp("servers"), stack)
