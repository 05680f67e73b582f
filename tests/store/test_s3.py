"""The object storage tier: what only it does, against a real service and against servers that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest

from cakekv.bench.servers import S3_SECRET, S3_USER
from cakekv.errors import BadInput, MissingChunk, NotDeleted, StoreError
from cakekv.store import s3
from cakekv.store.maintenance.walking import unwrapped
from cakekv.store.opening import open_store
from cakekv.store.s3 import open_s3
from cakekv.store.sizes import doubt_of
from tests.store.conftest import Servers

from . import servers
from .certificates import make_certificates, tls_relay
from .chunks import SIZE, chunk_of, key_of, read

LARGE = 20 << 20
LISTING = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'


def reply(status: Any, body: bytes = b"", length: Any = None, headers: bytes = b"") -> Any:
    head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n" % (status, len(body) if length is None else length)
    return head + b"Last-Modified: Mon, 12 Oct 2026 10:00:00 GMT\r\nETag: x\r\n" + headers + b"\r\n" + body


def requests(connection: Any) -> Iterator[Any]:
    """First lines of the requests on a connection, as they come."""
    stream = connection.makefile("rb")
    while first := stream.readline():
        while stream.readline().strip():
            pass
        yield first


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")


def test_a_store_by_url(shared: Servers) -> None:
    url = f"s3://bucket/by%20url/?endpoint={shared.s3}&http=true&region=us-east-1&path_style=true&timeout=5s"
    with open_store(url) as store:
        store.write(key_of(0), chunk_of(0))
        assert read(store, key_of(0)) == chunk_of(0)
        backend: Any = vars(unwrapped(store))["_backend"]
        (batch,) = obstore.list(backend)
        assert [meta["path"] for meta in batch] == [f"chunks/{key_of(0).hex()}"]
    with open_store(f"s3://bucket/by?endpoint={shared.s3}&http=true") as store:
        assert list(store) == [], "another prefix"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "s3://BUCKET"),
        ("gs:///prefix", "gs://BUCKET"),
        ("s3://me:hush@bucket", "credentials come from the environment"),
        ("s3://bucket?endpoint=http://localhost:1", "http=true"),
        ("s3://bucket?endpoint=localhost:1&http=true", "not an https:// address"),
        ("s3://localhost:9000/bucket", r"not a server: write s3://BUCKET/PREFIX\?endpoint="),
        ("s3://minio.example:9000/bucket/kv", "not a server"),
        ("s3://localhost/bucket", "not a server"),
        ("s3://10.0.0.1/bucket", "not a server"),
        ("gs://localhost:4443/bucket", "not a server"),
        ("az://127.0.0.1:10000/bucket", "not a server"),
        ("s3://bucket?endpoint=https://localhost:1&path_style=false", "write endpoint=https://bucket.HOST"),
        ("s3://bucket?endpoint=https://bucketeer.host&path_style=false", "leave path_style=false out"),
        ("s3://bucket?endpoint=https://[::1", "an endpoint is https://HOST"),
        ("s3://bucket?endpoint=https://me:hush@host", "credentials come from the environment"),
        ("s3://bucket?endpoint=https://host:hush", "an endpoint is https://HOST"),
        ("az://bucket?endpoint=https://host/account?sig=hush", "AZURE_STORAGE_SAS_KEY"),
        ("s3://bucket?timeout=0s", "timeout"),
        ("s3://bucket?ca=/nowhere/at/all", "cannot read the certificate"),
        ("az://container?region=x", "unknown option 'region'"),
    ],
)
def test_bad_urls_are_told_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        open_store(url)
    assert "hush" not in str(caught.value)


def test_large_chunks_go_in_parts(shared: Servers) -> None:
    with open_s3("bucket", "large", endpoint=shared.s3, http=True) as store:
        data = memoryview(bytearray(range(256)) * (LARGE // 256) + bytearray(b"end"))
        store.write(key_of(0), data)
        assert read(store, key_of(0)) == data
        with store.open(key_of(0)) as reader:
            part = memoryview(bytearray(100))
            assert reader.read_into(part, LARGE - 50) == 53
            assert part[:53] == data[LARGE - 50 :]
        assert obstore.head(store._backend, f"chunks/{key_of(0).hex()}")["e_tag"].endswith('-3"'), "of three parts"


def test_a_chunk_removed_or_replaced_between_open_and_read_is_missing(shared: Servers) -> None:
    with open_s3("bucket", "removed", endpoint=shared.s3, http=True) as store:
        for remove in (lambda: store.delete([key_of(0)]), lambda: store.write(key_of(0), chunk_of(0)[:5000])):
            store.write(key_of(0), chunk_of(0))
            with store.open(key_of(0)) as reader:
                remove()
                with pytest.raises(MissingChunk, match="meanwhile"):
                    reader.read_into(memoryview(bytearray(SIZE)), 0)


def test_a_size_that_was_looked_up_is_not_asked_for_again(shared: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_s3("bucket", "sizes", endpoint=shared.s3, http=True) as store:
        store.write(key_of(0), chunk_of(0))
        asked = []
        real_head = obstore.head
        monkeypatch.setattr(obstore, "head", lambda *args: asked.append(args) or real_head(*args))
        store.lookup([key_of(0)])
        assert read(store, key_of(0)) == chunk_of(0)
        assert len(asked) == 1
        assert read(store, key_of(0)) == chunk_of(0)
        assert len(asked) == 2, "a size is good for one opening"
        store.lookup([key_of(0)])
        store.delete([key_of(0)])
        with pytest.raises(MissingChunk):
            store.open(key_of(0))


def test_other_objects_are_no_chunks(shared: Servers) -> None:
    with open_s3("bucket", "others", endpoint=shared.s3, http=True) as store:
        store.write(key_of(0), chunk_of(0))
        for path in (
            "chunks/notes.txt",
            f"chunks/{key_of(1).hex()}/x",
            f"identities/{key_of(2).hex()}",
            "identities/x",
        ):
            obstore.put(store._backend, path, b"not JSON")
        assert [chunk.key for chunk in store] == [key_of(0)]
        assert store.identities() == {}


def test_tls(shared: Servers, tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    with tls_relay(files, int(shared.s3.rpartition(":")[2])) as port:
        where = f"s3://bucket/tls?endpoint=https://127.0.0.1:{port}&timeout=2s"
        with open_store(f"{where}&ca={files[0]}") as store:
            store.write(key_of(0), chunk_of(0))
            assert read(store, key_of(0)) == chunk_of(0)
        with pytest.raises(StoreError, match="can be reached"):
            open_store(where)


# Credentials


def test_wrong_credentials(shared: Servers, credentials: None) -> None:
    with pytest.raises(StoreError, match="Check the credentials") as caught:
        open_s3("bucket", endpoint=shared.s3, http=True)
    assert "hush" not in str(caught.value)


def test_credentials_from_a_file(shared: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "kv")
    file.write_text(f"[kv]\naws_access_key_id = {S3_USER}\naws_secret_access_key={S3_SECRET}\nx=y\n")
    with open_s3("bucket", "file", endpoint=shared.s3, http=True) as store:
        assert list(store) == []
    file.write_text("hush\n[")
    with pytest.raises(BadInput, match="cannot make sense of") as caught:
        open_s3("bucket", "file", endpoint=shared.s3, http=True)
    assert "hush" not in str(caught.value)


def test_a_bucket_that_is_not_there(shared: Servers) -> None:
    with pytest.raises(StoreError, match="Make the bucket first"):
        open_s3("missing-bucket", endpoint=shared.s3, http=True)


# One object that is not like the others


@contextmanager
def lying(monkeypatch: pytest.MonkeyPatch, answer: Any) -> Iterator[Any]:
    """A store of 8 objects in front of which sits a service that answers `answer(request)`, if that is not None."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    names = {key_of(number).hex().encode(): number for number in range(8)}

    def serve(connection: Any) -> None:
        for request in requests(connection):
            number = next((number for name, number in names.items() if name in request), None)
            if (other := answer(request, number)) is not None:
                connection.sendall(other)
            elif b"list-type" in request:
                connection.sendall(reply(b"200 OK", LISTING))
            elif number is None:
                connection.sendall(reply(b"404 Not Found"))
            elif b"HEAD" in request:
                connection.sendall(reply(b"200 OK", length=SIZE))
            else:
                connection.sendall(reply(b"200 OK", bytes(chunk_of(number))))

    with servers.answering(serve) as port, open_s3("b", endpoint=f"http://127.0.0.1:{port}", http=True) as store:
        yield store


@pytest.mark.parametrize("status", [b"403 Forbidden", b"400 Bad Request", b"500 Internal Server Error"])
def test_one_object_that_may_not_be_looked_at_is_a_miss(
    monkeypatch: pytest.MonkeyPatch, member: Callable[..., Any], status: bytes
) -> None:
    with lying(monkeypatch, lambda request, n: reply(status) if b"HEAD" in request and n == 3 else None) as store:
        tier = member(store, deadline_s=10, first_retry_s=100)
        keys = [key_of(number) for number in range(9)]
        found = tier.lookup(keys)
        assert found == [SIZE] * 3 + [None] + [SIZE] * 4 + [None]
        assert "1 of 9 chunks could not be looked up" in str(doubt_of(found))
        assert key_of(3).hex() not in str(doubt_of(found))
        assert tier.lookup([key_of(3)]) == [None], "nor does the tier go down for it alone"
        assert tier.is_up
        assert read(tier, key_of(4)) == chunk_of(4)


def test_one_object_that_hangs_is_not_waited_for_by_the_others(
    monkeypatch: pytest.MonkeyPatch, member: Callable[..., Any]
) -> None:
    well = threading.Event()
    with lying(monkeypatch, lambda request, n: well.wait(60) and None if n == 3 else None) as store:
        tier = member(store, deadline_s=1.0, first_retry_s=100)
        keys = [key_of(number) for number in range(8)]
        for _ in range(3):
            assert tier.lookup(keys) == [SIZE] * 3 + [None] + [SIZE] * 4
        assert tier.is_up
        well.set()


def test_a_look_up_that_takes_too_long_gives_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, member: Callable[..., Any]
) -> None:
    with lying(monkeypatch, lambda request, n: time.sleep(0.05) if b"HEAD" in request else None) as store:
        tier = member(store, deadline_s=2.0, first_retry_s=100)
        found = tier.lookup([key_of(number) for number in range(8)] + [key_of(100 + n) for n in range(3000)])
        assert found[:8] == [SIZE] * 8
        assert "did not answer in time" in str(doubt_of(found))
        assert tier.is_up
        assert tier.lookup([key_of(0), key_of(100)]) == [SIZE, None]


def test_what_a_look_up_did_not_get_to_is_not_written_again(
    monkeypatch: pytest.MonkeyPatch, member: Callable[..., Any]
) -> None:
    asked: list[bytes] = []

    def slowly(request: bytes, number: int) -> None:
        asked.append(request)
        if b"HEAD" in request:
            time.sleep(0.05)

    with lying(monkeypatch, slowly) as store:
        tier = member(store, deadline_s=0.5, first_retry_s=100)
        keys = [key_of(100 + number) for number in range(1000)] + [key_of(number) for number in range(8)]
        assert tier.lookup(keys)[-1] is None
        assert tier.write(key_of(7), chunk_of(7))
        assert not any(request.startswith(b"PUT") for request in asked)


def test_what_cannot_be_deleted_is_named_and_the_rest_goes(shared: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_s3("bucket", "undeleted", endpoint=shared.s3, http=True) as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
        real = obstore.delete

        def refuse(backend: Any, paths: Any) -> None:
            if any(key_of(1).hex() in path for path in paths):
                raise obstore.exceptions.PermissionDeniedError("403 Forbidden")
            real(backend, paths)

        monkeypatch.setattr(obstore, "delete", refuse)
        with pytest.raises(NotDeleted) as caught:
            store.delete([key_of(number) for number in range(3)])
        assert (caught.value.deleted, list(caught.value.left)) == (2, [key_of(1)])
        assert [chunk.key for chunk in store] == [key_of(1)]


# Trouble


def test_a_service_that_is_not_there(credentials: None) -> None:
    with pytest.raises(StoreError, match="can be reached"):
        open_s3("bucket", endpoint=f"http://127.0.0.1:{servers.free_port()}", http=True)


def test_a_service_that_accepts_and_never_answers(credentials: None) -> None:
    with servers.answering(servers.hang) as port, pytest.raises(StoreError, match="can be reached"):
        open_s3("bucket", endpoint=f"http://127.0.0.1:{port}", http=True, timeout_s=0.3)


def test_errors_of_the_service_are_retried_within_bounds(credentials: None) -> None:
    answers = []

    def fail_twice(connection: Any) -> None:
        for request in requests(connection):
            if b"HEAD" in request:
                answers.append(request)
                connection.sendall(reply(b"503 Slow Down" if len(answers) < 3 else b"200 OK", length=1000))
            else:
                connection.sendall(reply(b"200 OK", LISTING))

    with servers.answering(fail_twice) as port:
        store = open_s3("bucket", endpoint=f"http://127.0.0.1:{port}", http=True)
        assert store.lookup([key_of(0)]) == [1000]
        assert len(answers) == 3

    def fail(connection: Any) -> None:
        for request in requests(connection):
            answers.append(request)
            connection.sendall(reply(b"503 Slow Down"))

    answers.clear()
    with servers.answering(fail) as port, pytest.raises(StoreError, match="503"):
        open_s3("bucket", endpoint=f"http://127.0.0.1:{port}", http=True)
    assert len(answers) == 1 + s3.MAX_RETRIES


def test_a_failed_look_up_does_not_wait_for_the_rest(credentials: None) -> None:
    asked = []

    def refuse(connection: Any) -> None:
        for request in requests(connection):
            if b"HEAD" in request:
                asked.append(request)
                connection.sendall(reply(b"403 Forbidden"))
            else:
                connection.sendall(reply(b"200 OK", LISTING))

    with servers.answering(refuse) as port:
        store = open_s3("bucket", endpoint=f"http://127.0.0.1:{port}", http=True)
        with pytest.raises(StoreError, match="cannot look for chunks"):
            store.lookup([key_of(number) for number in range(2000)])
    assert len(asked) < 1000


def test_a_service_killed_in_mid_answer(credentials: None) -> None:
    def die(connection: Any) -> None:
        for request in requests(connection):
            if b"HEAD" in request:
                connection.sendall(reply(b"200 OK", length=100_000))
            elif b"GET /bucket/chunks" in request:
                connection.sendall(reply(b"200 OK", b"half", length=100_000))
                return
            else:
                connection.sendall(reply(b"200 OK", LISTING))

    with servers.answering(die) as port:
        store = open_s3("bucket", endpoint=f"http://127.0.0.1:{port}", http=True, timeout_s=1)
        with store.open(key_of(0)) as reader, pytest.raises(StoreError, match="cannot read chunk"):
            reader.read_into(memoryview(bytearray(100_000)), 0)
