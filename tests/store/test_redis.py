"""The Redis tier: what only it does, against real servers, and what it says when they misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from cakekv.chunk import verify_chunk
from cakekv.errors import BadInput, CorruptChunk, MissingChunk, NotDeleted, OutOfReach, StoreError, StoreFull
from cakekv.store.base import StoreStats
from cakekv.store.maintenance.listing import listing
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.redis import RedisStore
from cakekv.store.redis_server import RedisServer
from cakekv.store.sizes import doubt_of
from tests.store.conftest import Servers

from . import servers
from .certificates import make_certificates, tls_relay
from .chunks import SIZE, chunk_of, key_of, read

LARGE = 3 << 20
SECRET = "hush/hush@?"
QUOTED = "hush%2Fhush%40%3F"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    with servers.valkey(tmp_path) as (port, process):
        yield port, process


def test_a_store_by_url(shared: Servers) -> None:
    with open_store(f"redis://127.0.0.1:{shared.valkey}/3?prefix=by%20url:&timeout=2s") as store:
        assert store.write(key_of(0), chunk_of(0))
    client = redis.Redis(port=shared.valkey, db=3)
    assert client.keys() == [b"by url:chunk:" + key_of(0).hex().encode()]
    assert client.get(client.keys()[0]) == bytes(chunk_of(0))
    with open_store(f"valkey://127.0.0.1:{shared.valkey}/3?prefix=by%20url:") as store:
        assert read(store, key_of(0)) == chunk_of(0)
    with open_store(f"redis://127.0.0.1:{shared.valkey}/3?bandwidth=1GB/s") as store:
        assert store.lookup([key_of(0)]) == [None], "another prefix"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://", "write a Redis store as"),
        ("redis://localhost:port", "write a Redis store as"),
        ("redis://localhost/database", "write a Redis store as"),
        ("redis://localhost?ca=file", "unknown option 'ca'"),
        ("redis://localhost?cluster=yes", 'neither "true" nor'),
        ("redis://localhost/1?cluster=true", "no database but 0"),
        ("redis://localhost?timeout=0s", "timeout"),
        ("redis://localhost?ttl=1us", "ttl"),
    ],
)
def test_bad_urls_are_told_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_store(url)


def test_large_chunks_come_in_slices(shared: Servers) -> None:
    with RedisStore("127.0.0.1", shared.valkey, prefix="large:") as store:
        data = memoryview(bytearray(range(256)) * (LARGE // 256) + bytearray(b"end"))
        store.write(key_of(0), data)
        assert read(store, key_of(0)) == data
        assert store.lookup([key_of(0)]) == [LARGE + 3]


def test_a_chunk_is_one_request_however_it_is_read(shared: Servers) -> None:
    client = redis.Redis(port=shared.valkey)
    data = memoryview(os.urandom(LARGE + 3))
    with RedisStore("127.0.0.1", shared.valkey, prefix="stream:") as store:
        store.write(key_of(0), data)
        buffer = memoryview(bytearray(len(data)))
        for start, end, command in ((0, len(data), "get"), (5000, LARGE, "getrange")):
            client.config_resetstat()
            with store.open(key_of(0)) as reader:
                reader.announce(start, end)
                for offset in range(start, end, 300_000):
                    reader.read_into(buffer[offset : min(offset + 300_000, end)], offset)
            assert buffer[start:end] == data[start:end]
            calls = client.info("commandstats")
            assert calls[f"cmdstat_{command}"]["calls"] == 1
            assert {"cmdstat_get", "cmdstat_getrange"} & set(calls) == {f"cmdstat_{command}"}


def test_a_read_that_is_given_up_leaves_nothing_for_the_next(shared: Servers) -> None:
    with RedisStore("127.0.0.1", shared.valkey, prefix="given up:") as store:
        data = memoryview(os.urandom(LARGE))
        store.write(key_of(0), data)
        for leave in (0, 1, 4096, 1 << 20):
            with store.open(key_of(0)) as reader:
                reader.announce(0, LARGE)
                assert reader.read_into(memoryview(bytearray(leave)), 0) == leave
            assert read(store, key_of(0)) == data
        with store.open(key_of(0)) as reader:  # elsewhere than was announced
            reader.announce(0, LARGE)
            for offset in (0, 4096, 10, 2 << 20):
                piece = memoryview(bytearray(5000))
                assert reader.read_into(piece, offset) == 5000
                assert piece == data[offset : offset + 5000]


def test_a_read_does_not_go_through_redis_py(shared: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast is the path without copies; the other one is for answers that were not expected."""
    with RedisStore("127.0.0.1", shared.valkey, prefix="direct:") as store:
        store.write(key_of(0), chunk_of(0))
        monkeypatch.setattr(redis.Redis, "getrange", lambda *args: pytest.fail("by way of redis-py"))
        assert read(store, key_of(0)) == chunk_of(0)


def test_a_chunk_evicted_between_open_and_read_is_missing(shared: Servers) -> None:
    with RedisStore("127.0.0.1", shared.valkey, prefix="evicted:") as store:
        for size in (LARGE, 5):  # an answer that begins like the one expected, and one that does not
            store.write(key_of(0), memoryview(bytes(LARGE)))
            with store.open(key_of(0)) as reader:
                if size == LARGE:
                    store.delete([key_of(0)])
                else:
                    store.write(key_of(0), memoryview(bytes(size)))
                with pytest.raises(MissingChunk, match="was evicted"):
                    reader.read_into(memoryview(bytearray(LARGE)), 0)
        store.write(key_of(1), chunk_of(1))
        assert read(store, key_of(1)) == chunk_of(1)


def test_chunks_may_have_a_time_to_live(shared: Servers) -> None:
    with open_store(f"redis://127.0.0.1:{shared.valkey}?prefix=ttl:&ttl=100s") as store:
        store.write(key_of(0), chunk_of(0))
    (name,) = redis.Redis(port=shared.valkey).keys("ttl:*")
    assert 90_000 < redis.Redis(port=shared.valkey).pttl(name) <= 100_000


def test_a_server_that_is_full_says_so(server: tuple[int, subprocess.Popen[str]]) -> None:
    port, _ = server
    redis.Redis(port=port).config_set("maxmemory", "3mb")
    with RedisStore("127.0.0.1", port) as store:
        fill = lambda numbers: [store.write(key_of(number), chunk_of(number)) for number in numbers]  # noqa: E731
        with pytest.raises(StoreFull, match="maxmemory-policy"):
            fill(range(1000))
        redis.Redis(port=port).config_set("maxmemory-policy", "allkeys-lru")
        fill(range(1000, 1300))
        stored = list(store)
        assert 0 < len(stored) < 300
        whole = 0
        for chunk in stored[:20]:
            with suppress(MissingChunk):  # to answer takes memory, too, for which the server may evict
                verify_chunk(memoryview(read(store, chunk.key)))
                whole += 1
        assert whole > 0


def test_names_of_others_are_no_chunks(shared: Servers) -> None:
    client = redis.Redis(port=shared.valkey)
    with RedisStore("127.0.0.1", shared.valkey, prefix="others:") as store:
        store.write(key_of(0), chunk_of(0))
        for name in ("others:chunk:", f"others:chunk:{'g' * 64}", f"others:chunk:{key_of(1).hex()}x", "others:chunk"):
            client.set(name, "x")
        assert [chunk.key for chunk in store] == [key_of(0)]
        assert store.stats().chunks == 1
        assert abs(next(iter(store)).used_at - time.time()) < 60
        client.hset("others:identities", mapping={"no root": "{}", key_of(0).hex(): "not JSON"})
        assert store.identities() == {}
        client.rpush(f"others:chunk:{key_of(2).hex()}", "a list")
        assert store.lookup([key_of(2)]) == [None]


def test_a_value_of_another_kind_is_a_miss_and_nobody_elses(
    shared: Servers, member: Callable[..., Any], tiered: Callable[..., Any]
) -> None:
    client = redis.Redis(port=shared.valkey)
    with RedisStore("127.0.0.1", shared.valkey, prefix="kinds:") as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
        reader = store.open(key_of(1))
        name = store.name_of(key_of(1))
        client.delete(name)
        client.rpush(name, "a list")
        keys = [key_of(number) for number in range(4)]
        found = store.lookup(keys)
        assert found == [SIZE, None, SIZE, None]
        assert "1 of 4 chunks could not be looked up" in str(doubt_of(found))
        assert "no string" in str(doubt_of(found))
        with pytest.raises(CorruptChunk, match="no string"):
            store.open(key_of(1))
        with pytest.raises(CorruptChunk, match="no string"):
            reader.read_into(memoryview(bytearray(SIZE)), 0)
        assert {chunk.key: bool(chunk.fault) for chunk in store} == {key_of(n): n == 1 for n in range(3)}
        assert store.stats()[:2] == (2, 2 * SIZE)
        assert [key_of(1).hex() in one for one in store.stats().uncounted] == [True]
        together = tiered((MemoryStore(),), (member(store),))
        for _ in range(5):
            assert together.lookup([key_of(1)]) == [None]
            with pytest.raises(CorruptChunk):
                together.open(key_of(1))
        assert together.lookup(keys) == [SIZE, None, SIZE, None]
        assert all(one.is_up for one in together.members)
        assert store.write(key_of(1), chunk_of(1)), "saving heals it"
        assert store.lookup(keys) == [SIZE, SIZE, SIZE, None]
        assert doubt_of(store.lookup(keys)) is None
        client.delete(name)
        client.rpush(name, "a list")
        assert store.delete(keys) == 3


def test_more_look_ups_than_connections_wait_for_one(tmp_path: Path) -> None:
    with servers.valkey(tmp_path) as (port, process), RedisStore("127.0.0.1", port) as store:
        store.write(key_of(0), chunk_of(0))
        servers.suspend(process)
        with ThreadPoolExecutor(200) as pool:
            asked = [pool.submit(store.lookup, [key_of(0)]) for _ in range(200)]
            time.sleep(0.3)
            process.send_signal(signal.SIGCONT)
            assert [one.result() for one in asked] == [[SIZE]] * 200
        assert redis.Redis(port=port).info("clients")["maxclients"] > 200
        assert redis.Redis(port=port).info("stats")["total_connections_received"] < 100


# Passwords and TLS


def test_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.valkey(tmp_path, "--requirepass", SECRET) as (port, _):
        with open_store(f"redis://default:{QUOTED}@127.0.0.1:{port}") as store:
            store.write(key_of(0), chunk_of(0))
        for url in (f"redis://:wrong{QUOTED}@127.0.0.1:{port}", f"redis://127.0.0.1:{port}"):
            with pytest.raises(StoreError, match="Check user name and password") as caught:
                open_store(url)
            assert "hush" not in str(caught.value)
        monkeypatch.setenv("REDISCLI_AUTH", SECRET)
        with open_store(f"redis://127.0.0.1:{port}") as store:
            assert read(store, key_of(0)) == chunk_of(0)
            assert SECRET not in repr(store)


def test_a_password_is_never_shown() -> None:
    for url in (
        f"redis://me:{QUOTED}@127.0.0.1:1",
        f"redis://me:{QUOTED}@h?a=b",
        f"radis://me:{QUOTED}@h",
        "redis://hush@h:x",
    ):
        with pytest.raises((BadInput, StoreError)) as caught:
            open_store(url)
        assert "hush" not in str(caught.value)


def test_tls(tmp_path: Path, shared: Servers) -> None:
    files = make_certificates(tmp_path)
    with tls_relay(files, shared.valkey) as port:
        with open_store(f"rediss://127.0.0.1:{port}?ca={files[0]}&prefix=tls:") as store:
            data = memoryview(bytes(LARGE))
            store.write(key_of(0), data)
            assert read(store, key_of(0)) == data
        with pytest.raises(StoreError, match="certificate verify failed"):
            open_store(f"rediss://127.0.0.1:{port}")
        with pytest.raises(StoreError, match="TLS"):
            open_store(f"redis://127.0.0.1:{port}?timeout=1s")


# Trouble


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(StoreError, match="See whether the server runs"):
        open_store(f"redis://127.0.0.1:{servers.free_port()}")


def test_a_server_that_accepts_and_never_answers() -> None:
    with servers.answering(servers.hang) as port, pytest.raises(StoreError, match="does not answer in time"):
        open_store(f"redis://127.0.0.1:{port}?timeout=0.2s")


def test_a_server_that_stops_answering(server: tuple[int, subprocess.Popen[str]]) -> None:
    port, process = server
    with RedisStore("127.0.0.1", port, timeout_s=0.2) as store:
        store.write(key_of(0), chunk_of(0))
        reader = store.open(key_of(0))
        servers.suspend(process)
        buffer = memoryview(bytearray(SIZE))
        attempts = [
            lambda: store.lookup([key_of(0)]),
            lambda: store.open(key_of(0)),
            lambda: reader.read_into(buffer, 0),
            lambda: store.write(key_of(1), memoryview(bytes(64 << 20))),
            lambda: store.delete([key_of(0)]),
            lambda: list(store),
            store.stats,
            store.identities,
            lambda: store.remember_identity(key_of(5).hex(), {}),
        ]
        for attempt in attempts:
            with pytest.raises(StoreError, match="does not answer in time"):
                attempt()
        process.send_signal(signal.SIGCONT)
        assert reader.read_into(buffer, 0) == SIZE
        assert buffer == chunk_of(0)
        assert store.lookup([key_of(1)]) == [None], "half a chunk became visible"


def answering_get(answer: Any) -> Any:
    """A server with a chunk of 1,000 bytes; a connection ends with the answer to a GET."""

    def serve(connection: Any) -> None:
        while request := connection.recv(1 << 16):
            if b"\r\nGET\r\n" in request:
                answer(connection)
                return
            connection.sendall(b":1000\r\n" if b"STRLEN" in request else b"+OK\r\n" * request.count(b"*"))

    return servers.answering(serve)


def test_an_answer_that_trickles_does_not_take_forever() -> None:
    def trickle(connection: Any) -> None:
        connection.sendall(b"$1000\r\n")
        for _ in range(1000):
            connection.sendall(b"x")
            time.sleep(0.02)

    with (
        answering_get(trickle) as port,
        RedisStore("127.0.0.1", port, timeout_s=0.3) as store,
        store.open(key_of(0)) as reader,
        pytest.raises(StoreError, match="too slow"),
    ):
        reader.read_into(memoryview(bytearray(1000)), 0)


@pytest.mark.parametrize("length", [b":abc\r\n", b"$3\r\nabc\r\n", b":-5\r\n", b":99999999999999\r\n", b"*1\r\n:3\r\n"])
def test_a_server_that_makes_lengths_up(length: bytes) -> None:
    def lie(connection: Any) -> None:
        while request := connection.recv(1 << 16):
            connection.sendall(length if b"STRLEN" in request else b"+OK\r\n" * request.count(b"*"))

    with servers.answering(lie) as port, RedisStore("127.0.0.1", port, timeout_s=1) as store:
        for attempt in (lambda: store.open(key_of(0)), lambda: store.lookup([key_of(0)])):
            with pytest.raises(StoreError):
                attempt()


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"$50000000000\r\n", MissingChunk),
        (b"$-1\r\n", MissingChunk),
        (b"-ERR no\r\n", StoreError),
        (b"+" + bytes(4096), MissingChunk),
    ],
)
def test_another_answer_than_the_chunk_is_not_waited_for(head: bytes, error: type[Exception]) -> None:
    def lie(connection: Any) -> None:
        connection.sendall(head)
        connection.recv(1)  # the end

    with (
        answering_get(lie) as port,
        RedisStore("127.0.0.1", port, timeout_s=20) as store,
        store.open(key_of(0)) as reader,
    ):
        began = time.monotonic()
        with pytest.raises(error):
            reader.read_into(memoryview(bytearray(1000)), 0)
        assert time.monotonic() - began < 10, "it waited for the rest"


def test_a_server_killed_in_mid_answer() -> None:
    def die(connection: Any) -> None:
        connection.sendall(b"$1000\r\nhalf")
        connection.close()

    with (
        answering_get(die) as port,
        RedisStore("127.0.0.1", port, timeout_s=5) as store,
        store.open(key_of(0)) as reader,
        pytest.raises(StoreError, match="closed the connection"),
    ):
        reader.read_into(memoryview(bytearray(1000)), 0)


def test_a_server_killed_and_started_again(tmp_path: Path) -> None:
    with servers.valkey(tmp_path) as (port, process):
        store = RedisStore("127.0.0.1", port)
        store.write(key_of(0), chunk_of(0))
        reader = store.open(key_of(0))
        reader.read_into(memoryview(bytearray(4096)), 0)
        process.kill()
        process.wait()
        for attempt in (lambda: reader.read_into(memoryview(bytearray(4096)), 4096), lambda: store.open(key_of(0))):
            with pytest.raises(StoreError, match="See whether the server runs"):
                attempt()
    with servers.valkey(tmp_path, port=port):
        with pytest.raises(MissingChunk):
            reader.read_into(memoryview(bytearray(4096)), 4096)
        assert store.lookup([key_of(0)]) == [None]
        assert store.write(key_of(0), chunk_of(0))
        assert read(store, key_of(0)) == chunk_of(0)
    store.close()
    store.close()


# Clusters


@pytest.fixture
def cluster(nodes: list[tuple[Any, subprocess.Popen[str]]]) -> list[Any]:
    """Two nodes, each with half of the slots."""
    return [node for node, _ in nodes]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[tuple[Any, subprocess.Popen[str]]]]:
    """The same, with their processes."""
    options: tuple[str, ...] = (
        "--cluster-enabled",
        "yes",
        "--cluster-node-timeout",
        "5000",
        "--cluster-require-full-coverage",
        "no",
    )
    options += ("--cluster-allow-reads-when-down", "yes", "--cluster-port")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with (
        servers.valkey(tmp_path / "a", *options, servers.free_port()) as (first, one),
        servers.valkey(tmp_path / "b", *options, buses := servers.free_port()) as (second, other),
    ):
        nodes = [redis.Redis(port=port) for port in (first, second)]
        nodes[0].execute_command("CLUSTER ADDSLOTSRANGE 0 8191")
        nodes[1].execute_command("CLUSTER ADDSLOTSRANGE 8192 16383")
        nodes[0].execute_command(f"CLUSTER MEET 127.0.0.1 {second} {buses}")
        deadline = time.monotonic() + 30
        while any(node.cluster("info")["cluster_state"] != "ok" for node in nodes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield list(zip(nodes, (one, other), strict=True))


@pytest.mark.parametrize("how", ["dead", "hanging"])
def test_a_node_that_is_away_costs_its_own_chunks(
    nodes: list[tuple[Any, subprocess.Popen[str]]], member: Callable[..., Any], how: str
) -> None:
    (first, _), (_, process) = nodes
    port = first.get_connection_kwargs()["port"]
    keys = [key_of(number) for number in range(30)]
    with RedisStore("127.0.0.1", port, cluster=True, timeout_s=1.0) as store:
        for number in range(30):
            store.write(key_of(number), chunk_of(number))
        there = {name.decode() for name in first.keys("*")}
        sizes = [SIZE if store.name_of(key) in there else None for key in keys]
        assert 0 < sizes.count(None) < 30
        process.kill() if how == "dead" else servers.suspend(process)
        tier = member(store, deadline_s=2.0)
        found = tier.lookup(keys)
        assert found == sizes
        assert f"{sizes.count(None)} of 30 chunks could not be looked up" in str(doubt_of(found))
        gone = [key for key, size in zip(keys, sizes, strict=True) if size is None]
        assert tier.lookup(gone[:1]) == [None], "not even of one chunk does the tier go down"
        for key in gone[:5]:
            with pytest.raises(OutOfReach):
                tier.open(key)
            with pytest.raises(OutOfReach):
                tier.write(key, chunk_of(0))
        assert tier.is_up
        for number, size in enumerate(sizes):
            if size is not None:
                assert read(tier, key_of(number)) == chunk_of(number)
        listed = listing(store)
        assert {chunk.key for chunk in listed.chunks} == {
            key for key, size in zip(keys, sizes, strict=True) if size is not None
        }
        assert "is left out" in listed.troubles[0]
        assert store.stats().chunks == 30 - len(gone)
        with pytest.raises(NotDeleted) as caught:
            store.delete(keys)
        assert caught.value.deleted == 30 - len(gone)
        assert set(caught.value.left) == set(gone)
        assert first.dbsize() == 0


def test_a_cluster_of_which_nothing_answers_is_down(
    nodes: list[tuple[Any, subprocess.Popen[str]]], member: Callable[..., Any]
) -> None:
    port = nodes[0][0].get_connection_kwargs()["port"]
    with RedisStore("127.0.0.1", port, cluster=True, timeout_s=0.5) as store:
        tier = member(store, deadline_s=2.0, first_retry_s=100)
        for _, process in nodes:
            process.kill()
        with pytest.raises(StoreError):
            tier.lookup([key_of(number) for number in range(30)])
        assert not tier.is_up


def test_a_cluster(cluster: list[Any]) -> None:
    with open_store(f"redis://127.0.0.1:{cluster[0].get_connection_kwargs()['port']}?cluster=true") as store:
        for number in range(10):
            assert store.write(key_of(number), chunk_of(number))
        assert all(0 < node.dbsize() < 10 for node in cluster), "they share"
        assert store.lookup([key_of(number) for number in range(11)]) == [SIZE] * 10 + [None]
        for number in range(10):
            assert read(store, key_of(number)) == chunk_of(number)
        assert {chunk.key for chunk in store} == {key_of(number) for number in range(10)}
        assert store.stats() == StoreStats(10, 10 * SIZE, None)
        store.remember_identity(key_of(20).hex(), {"dtype": "float32"})
        assert store.identities() == {key_of(20).hex(): {"dtype": "float32"}}
        assert store.delete([key_of(number) for number in range(5)]) == 5
        with pytest.raises(MissingChunk):
            store.open(key_of(0))


def test_a_node_of_a_cluster_asked_as_if_it_were_alone(cluster: list[Any]) -> None:
    with (
        open_store(f"redis://127.0.0.1:{cluster[0].get_connection_kwargs()['port']}") as store,
        pytest.raises(StoreError, match="is a node of a cluster: write cluster=true"),
    ):
        store.lookup([key_of(number) for number in range(10)])


def test_a_server_that_is_no_node_of_a_cluster(shared: Servers) -> None:
    with pytest.raises(StoreError, match="no node of a cluster: leave cluster=true out"):
        open_store(f"redis://127.0.0.1:{shared.valkey}?cluster=true")
    with pytest.raises(StoreError, match="See whether the server runs there"):
        open_store("redis://127.0.0.1:1?cluster=true&timeout=1s")


@pytest.mark.parametrize("password", ["a/b", "a#b", "a?b", "a@b/c", "a%zz/b"])
def test_what_is_to_be_escaped_in_a_password_is_said(password: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"@ is written as %40|is to be written as %3F"):
        open_store(f"redis://me:{password}@127.0.0.1:1/x")
    with servers.valkey(tmp_path, "--requirepass", password) as (port, _):
        with pytest.raises(StoreError, match="in which @ is written as %40"):
            open_store(f"redis://:wrong@127.0.0.1:{port}")
        open_store(f"redis://:{quote(password, safe='')}@127.0.0.1:{port}").close()


def test_what_a_server_says_is_one_line(shared: Servers) -> None:
    """Whatever it sends: line ends, codes for terminals, megabytes."""
    options = {"host": "127.0.0.1", "port": shared.valkey}
    with (
        closing(RedisServer("redis://127.0.0.1", options, database=0, timeout_s=5.0)) as server,
        pytest.raises(StoreError) as caught,
        server.explained("ask"),
    ):
        raise redis.ResponseError("ERR one\r\ntwo\x1b[2J" + "x" * 10**6)
    assert "ERR one two\ufffd[2J" in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_slots_that_move_are_followed(cluster: list[Any]) -> None:
    port = cluster[0].get_connection_kwargs()["port"]
    with RedisStore("127.0.0.1", port, cluster=True) as store:
        store.write(key_of(0), chunk_of(0))
        source = next(node for node in cluster if node.dbsize())
        target = next(node for node in cluster if node is not source)
        names = {node: node.cluster("myid").decode() for node in cluster}
        slot = source.cluster("keyslot", source.keys()[0])
        reader = store.open(key_of(0))
        target.execute_command(f"CLUSTER SETSLOT {slot} IMPORTING {names[source]}")
        source.execute_command(f"CLUSTER SETSLOT {slot} MIGRATING {names[target]}")
        host = target.get_connection_kwargs()
        source.migrate("127.0.0.1", host["port"], source.keys(), 0, 5000)
        for node in (target, source):
            node.execute_command(f"CLUSTER SETSLOT {slot} NODE {names[target]}")
        buffer = memoryview(bytearray(SIZE))
        assert reader.read_into(buffer, 0) == SIZE
        assert buffer == chunk_of(0)
        assert store.write(key_of(0), chunk_of(1))
        assert read(store, key_of(0)) == chunk_of(1)
        assert target.dbsize() == 1
