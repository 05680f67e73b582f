"""The Mooncake tier: what only it does, against a real pool, and what it says when that misbehaves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.store.conftest import Servers
from tests.store.servers import Mooncake

pytest.importorskip(
    "mooncake.store", reason="Mooncake's client is not there, or not for this system", exc_type=ImportError
)

from mooncake.store import MooncakeDistributedStore

from cakekv.errors import BadInput, MissingChunk, StoreError, StoreFull
from cakekv.store import mooncake, mooncake_client
from cakekv.store.mooncake import MooncakeStore
from cakekv.store.opening import open_store

from . import servers
from .chunks import SIZE, chunk_of, key_of, read

LARGE = 3 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Mooncake]:
    with servers.mooncake(tmp_path, "32 MB") as pool:
        yield pool


def store_in(pool: Any, **options: Any) -> Any:
    return MooncakeStore("127.0.0.1", pool.port, admin_port=pool.admin_port, **options)


def test_a_store_by_url(shared: Servers) -> None:
    url = f"mooncake://127.0.0.1:{shared.mooncake.port}?admin_port={shared.mooncake.admin_port}"
    with open_store(f"{url}&prefix=by%20url:&timeout=2s&metadata=P2PHANDSHAKE&protocol=tcp") as store:
        assert store.write(key_of(0), chunk_of(0))
    with open_store(f"{url}&prefix=by%20url:&bandwidth=1GB/s") as store:
        assert read(store, key_of(0)) == chunk_of(0)
    with open_store(url) as store:
        assert store.lookup([key_of(0)]) == [None], "another prefix"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mooncake://", "write a Mooncake store as"),
        ("mooncake://localhost:port", "write a Mooncake store as"),
        ("mooncake://localhost/folder", "write a Mooncake store as"),
        ("mooncake://user:secret@localhost", "write a Mooncake store as"),
        ("mooncake://localhost?capacity=1GB", "unknown option 'capacity'"),
        ("mooncake://localhost?timeout=0s", "timeout"),
        ("mooncake://localhost?admin_port=65536", "admin_port"),
    ],
)
def test_bad_urls_are_told_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_store(url)


def test_nobody_there_is_found_out_at_once() -> None:
    with pytest.raises(StoreError, match="whether Mooncake's master runs"):
        MooncakeStore("127.0.0.1", servers.free_port())


def test_large_chunks_come_in_slices(shared: Servers) -> None:
    with store_in(shared.mooncake, prefix="large:") as store:
        data = memoryview(bytearray(range(256)) * (LARGE // 256) + bytearray(b"end"))
        store.write(key_of(0), data)
        assert read(store, key_of(0)) == data
        assert store.lookup([key_of(0)]) == [LARGE + 3]


def test_a_chunk_replaced_between_open_and_read_is_missing(shared: Servers) -> None:
    with store_in(shared.mooncake, prefix="replaced:") as store:
        store.write(key_of(0), memoryview(bytes(LARGE)))
        with store.open(key_of(0)) as reader:
            store.write(key_of(0), chunk_of(0)[:5])
            with pytest.raises(MissingChunk, match="or replaced, meanwhile"):
                reader.read_into(memoryview(bytearray(LARGE)), 0)
        assert read(store, key_of(0)) == chunk_of(0)[:5]


def test_a_full_pool_says_so_and_goes_on(pool: Mooncake) -> None:
    with store_in(pool) as store:
        store.write(key_of(0), chunk_of(0))
        with pytest.raises(StoreFull, match="has no room"):
            store.write(key_of(1), memoryview(bytes(64 << 20)))
        assert store.lookup([key_of(1)]) == [None]
        store.write(key_of(2), chunk_of(2))
        assert read(store, key_of(2)) == chunk_of(2)


def test_names_of_others_are_no_chunks(shared: Servers) -> None:
    other = MooncakeDistributedStore()
    assert other.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 20, "tcp", "", f"127.0.0.1:{shared.mooncake.port}") == 0
    with store_in(shared.mooncake, prefix="others:") as store:
        store.write(key_of(0), chunk_of(0))
        for name in (
            "others:chunk:",
            f"others:chunk:{'g' * 64}",
            f"others:chunk:{key_of(1).hex()}x",
            "others:identity:x",
        ):
            other.put(name, b"x")
        other.put(f"others:identity:{key_of(0).hex()}", b"not JSON")
        other.put(f"others:identity:{key_of(1).hex()}", bytes(100_000))
        assert [(chunk.key, chunk.size) for chunk in store] == [(key_of(0), SIZE)]
        assert store.identities() == {}
    other.close()


def test_a_master_that_hangs_costs_the_deadline_and_no_bytes(pool: Mooncake) -> None:
    """The calls that were given up end later; what they read then must not get into another's buffer."""
    with store_in(pool) as patient, store_in(pool, timeout_s=0.3) as store:  # of one client
        for number in range(3):
            patient.write(key_of(number), chunk_of(number))
        reader = store.open(key_of(0))
        buffer = memoryview(bytearray(b"\xee" * SIZE))
        servers.suspend(pool.master)
        try:
            with pytest.raises(StoreError, match="no answer within"):
                reader.read_into(buffer, 0)
            with pytest.raises(StoreError, match="no answer within"):
                store.lookup([key_of(0)])
            with pytest.raises(StoreError, match="no answer within"):
                store.write(key_of(3), chunk_of(3))
        finally:
            pool.master.send_signal(signal.SIGCONT)
        for number in (1, 2, 1, 0):
            assert read(patient, key_of(number)) == chunk_of(number)
        assert buffer == b"\xee" * SIZE


def test_no_more_calls_hang_than_there_may_be(pool: Mooncake) -> None:
    with store_in(pool), store_in(pool, timeout_s=0.05) as store:  # which is given a client that is open
        servers.suspend(pool.master)
        try:
            for _ in range(2 * mooncake_client.MOST_CALLS):
                with pytest.raises(StoreError, match="no answer"):
                    store.lookup([key_of(0)])
        finally:
            pool.master.send_signal(signal.SIGCONT)


def test_a_node_that_is_gone_costs_its_chunks(pool: Mooncake) -> None:
    with store_in(pool, timeout_s=1.0) as store:
        store.write(key_of(0), memoryview(bytes(LARGE)))
        reader = store.open(key_of(0))
        pool.node.kill()
        pool.node.wait()
        with pytest.raises(StoreError):
            reader.read_into(memoryview(bytearray(LARGE)), 0)
        assert len(store._client._kept) == 1, "a transfer that failed may go on"


def test_stores_share_a_client_until_the_last_is_closed(pool: Mooncake) -> None:
    first, second = store_in(pool, prefix="a:"), store_in(pool, prefix="b:")
    assert first._client is second._client
    first.close()
    second.write(key_of(0), chunk_of(0))
    assert read(second, key_of(0)) == chunk_of(0)
    client = second._client
    second.close()
    with store_in(pool, prefix="b:") as third:
        assert third._client is not client
        assert read(third, key_of(0)) == chunk_of(0)


def test_a_master_that_died_is_an_error(pool: Mooncake) -> None:
    with store_in(pool, timeout_s=1.0) as store:
        store.write(key_of(0), chunk_of(0))
        reader = store.open(key_of(0))
        pool.master.kill()
        pool.master.wait()
        for operation in (
            lambda: store.lookup([key_of(0)]),
            lambda: store.open(key_of(0)),
            lambda: reader.read_into(memoryview(bytearray(SIZE)), 0),
            lambda: store.write(key_of(1), chunk_of(1)),
            lambda: store.delete([key_of(0)]),
            store.stats,
        ):
            with pytest.raises(StoreError):
                operation()


def test_without_the_admin_port_chunks_are_found_but_not_listed(shared: Servers) -> None:
    with MooncakeStore("127.0.0.1", shared.mooncake.port, admin_port=servers.free_port(), prefix="listed:") as store:
        store.write(key_of(0), chunk_of(0))
        assert read(store, key_of(0)) == chunk_of(0)
        with pytest.raises(StoreError, match="admin_port="):
            store.stats()


@contextmanager
def answering_http(body: Any, head: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[Any]:
    def answer(connection: Any) -> None:
        connection.recv(1 << 16)
        connection.sendall(head + body)

    with servers.answering(answer) as port:
        yield port


@pytest.mark.parametrize("body", [b"", b"\xff\x00\n" * 99, b"listed:chunk:" + b"0" * 63, b"listed:chunk:" + b"0" * 65])
def test_a_list_of_nonsense_names_nothing(shared: Servers, body: bytes) -> None:
    with answering_http(body) as port, MooncakeStore("127.0.0.1", shared.mooncake.port, admin_port=port) as store:
        assert list(store) == []


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 99 + b"\r\n", b"HTTP/1.1 500 No\r\n\r\n", b"HTTP/1.1 302 No\r\nLocation: /\r\n\r\n"]
)
def test_no_list_is_an_error(shared: Servers, head: bytes) -> None:
    with (
        answering_http(b"", head) as port,
        MooncakeStore("127.0.0.1", shared.mooncake.port, admin_port=port) as store,
        pytest.raises(StoreError, match="admin_port="),
    ):
        store.stats()


def test_a_list_without_end_is_not_read(shared: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "_MAX_LIST_BYTES", 1000)
    with (
        answering_http(b"x\n" * 10_000) as port,
        MooncakeStore("127.0.0.1", shared.mooncake.port, admin_port=port) as store,
        pytest.raises(StoreError, match="exceeds"),
    ):
        store.stats()


def test_a_closed_store_says_so(shared: Servers) -> None:
    store = store_in(shared.mooncake)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.lookup([key_of(0)])
