"""A server behind a link, and what its databases hold, which does not pass the link. Needs root, ip and tc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from cakekv.bench.link import ShapedLink
from cakekv.bench.servers import VALKEY_PORT, valkey_behind
from cakekv.bench.valkey import ValkeyDatabase
from cakekv.errors import CakeError


@pytest.fixture
def link() -> Iterator[Any]:
    try:
        with ShapedLink() as made:
            yield made
    except CakeError as error:
        pytest.skip(str(error))


def test_what_a_database_holds(link: Any, tmp_path: Path) -> None:
    socket_path = tmp_path / "valkey.sock"
    with valkey_behind(link, socket_path):
        databases = [ValkeyDatabase(socket_path, number) for number in (0, 1)]
        client = redis.Redis(link.far_address, VALKEY_PORT, db=1)
        client.mset({"a": bytes(5), "b": bytes(100_000)})
        client.hset("notes", "name", "text")
        assert sorted(databases[1].held()) == [5, 100_000]
        assert sorted(databases[1].wait_until_holds(2, 1.0)) == [5, 100_000]
        assert databases[0].held() == []
        before = databases[0].sent_bytes()
        client.get("b")
        assert 100_000 <= databases[0].sent_bytes() - before < 105_000
        link.set_bandwidth(1000)  # a look through the link would take a while now
        with pytest.raises(CakeError, match="2 of 3"):
            databases[1].wait_until_holds(3, 0.1)
        with pytest.raises(CakeError, match="instead of 1"):
            databases[1].wait_until_holds(1, 0.1)
        databases[1].clear()
        assert databases[1].held() == []
