"""Archives: what tar makes of them, and that a hostile one does nothing."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakekv.chunk import MAX_CHUNK_BYTES
from cakekv.errors import BadInput
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.keyring import Keyring
from cakekv.store.maintenance.archive import MARKER, export, import_archive
from cakekv.store.memory import MemoryStore
from tests.store.chunks import SIZE, chunk_of, key_of, read

ROOT = key_of(99).hex()
MARK = b'{"cakekv_archive": 1}'


class Pipe(io.RawIOBase):
    """Neither seekable, nor generous: a few bytes at a time."""

    def __init__(self, data: Any) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> Any:
        return self._data.read(min(size, 1000))


@pytest.fixture
def archive() -> bytes:
    """The bytes of a store of three chunks, used in the order 1, 2, 0."""
    store = MemoryStore()
    for number in (1, 2, 0):
        store.write(key_of(number), chunk_of(number))
    store.remember_identity(ROOT, {"dtype": "float32"})
    stream = io.BytesIO()
    export(store, stream)
    return stream.getvalue()


def member(name: str, data: bytes = b"", **fields: Any) -> Any:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def archive_of(*members: Any) -> Any:
    return member(MARKER, MARK) + b"".join(members) + bytes(1024)


def imported(data: Any) -> Any:
    store = MemoryStore()
    return store, import_archive(io.BytesIO(data), store)


def test_tar_reads_it(archive: bytes, tmp_path: Path) -> None:
    names = subprocess.run(["tar", "t"], input=archive, capture_output=True, check=True).stdout.decode().split()
    chunks = [f"chunks/{key_of(number).hex()}" for number in (1, 2, 0)]
    assert names == [MARKER, f"identities/{ROOT}.json", *chunks]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.extractfile(chunks[0]).read() == chunk_of(1)
        assert {info.mode for info in tar} == {0o600}


def test_what_tar_makes_is_read(tmp_path: Path, archive: bytes) -> None:
    subprocess.run(["tar", "x", "-C", tmp_path], input=archive, check=True)
    names = [MARKER, *sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))]
    made = subprocess.run(["tar", "c", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    store, result = imported(made)
    assert (result.chunks, result.identities) == (3, 1)
    assert read(store, key_of(1)) == chunk_of(1)


def test_it_comes_through_a_pipe_and_keeps_the_order_of_use(archive: bytes) -> None:
    store = MemoryStore(2 * SIZE)
    assert import_archive(cast(BinaryIO, Pipe(archive)), store).chunks == 3
    assert {chunk.key for chunk in store} == {key_of(2), key_of(0)}, "the one used last is written last"


@pytest.mark.parametrize("at", [-1e9, 0.0, 4e9, 1e12, 1e300])
def test_chunks_whose_time_is_none_are_exported(at: float) -> None:
    store = MemoryStore(clock=lambda: at)
    store.write(key_of(0), chunk_of(0))
    stream = io.BytesIO()
    assert export(store, stream).chunks == 1
    stream.seek(0)
    assert import_archive(stream, MemoryStore()).chunks == 1


def test_a_sealed_store_is_exported_in_the_open_and_sealed_again(archive: bytes) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, Keyring([bytes(32)]))
    import_archive(io.BytesIO(archive), store)
    assert bytes(chunk_of(0)[5000:5100]) not in read(inner, key_of(0))
    again = io.BytesIO()
    export(store, again)
    assert imported(again.getvalue())[1].chunks == 3


@pytest.mark.parametrize("at", [5000, 4096 + 512, SIZE - 1])
def test_a_damaged_chunk_is_left_out(at: int) -> None:
    data = bytearray(chunk_of(0))
    data[at] ^= 1
    store, result = imported(archive_of(member(f"chunks/{key_of(0).hex()}", bytes(data))))
    assert (result.chunks, list(result.corrupt)) == (0, [key_of(0)])
    assert list(store) == []


def test_a_sound_chunk_under_anothers_name_is_left_out() -> None:
    _, result = imported(archive_of(member(f"chunks/{key_of(1).hex()}", bytes(chunk_of(0)))))
    assert "another key" in result.corrupt[key_of(1)]


CHUNK = f"chunks/{key_of(0).hex()}"
HOSTILE = {
    "climbs": member("../../etc/passwd", b"root"),
    "absolute": member("/etc/passwd", b"root"),
    "climbs in a key": member(f"chunks/../{key_of(0).hex()}", b"x"),
    "capitals": member(CHUNK.upper(), b"x"),
    "more behind": member(CHUNK + "\n", b"x"),
    "symlink": member(CHUNK, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "link": member(CHUNK, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": member(CHUNK, type=tarfile.CHRTYPE),
    "pipe": member(CHUNK, type=tarfile.FIFOTYPE),
    "folder": member("chunks/", type=tarfile.DIRTYPE),
    "long name": member("././@LongLink", b"x" * 200, type=tarfile.GNUTYPE_LONGNAME),
    "pax": member("x", b"30 path=/etc/passwd\n", type=tarfile.XHDTYPE),
    "sparse": member(CHUNK, type=tarfile.GNUTYPE_SPARSE),
    "huge": member(CHUNK)[:124] + b"77777777777\0" + member(CHUNK)[136:],
    "huge note": member(f"identities/{ROOT}.json", b" " * 70_000),
    "no header": b"\xff" * 512,
}


def fixed(header: Any) -> Any:
    """With the checksum that tar wants, so that what is tested is reached."""
    if len(header) < 512 or header[:1] == b"\xff":
        return header
    block = bytearray(header[:512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + header[512:]


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_member_is_refused_and_nothing_is_made_of_it(
    trick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = member(f"chunks/{key_of(1).hex()}", bytes(chunk_of(1)))
    store = MemoryStore()
    with pytest.raises(BadInput, match="archive"):
        import_archive(io.BytesIO(archive_of(good, fixed(HOSTILE[trick]))), store)
    assert [chunk.key for chunk in store] == [key_of(1)], "what came before it was sound"
    assert store.identities() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_a_lie_takes_no_memory() -> None:
    lie = fixed(member(CHUNK)[:124] + b"%011o\0" % (MAX_CHUNK_BYTES - 1) + member(CHUNK)[136:])
    with pytest.raises(BadInput, match="cut off"):
        imported(member(MARKER, MARK) + lie + bytes(5000))


def test_negative_sizes_are_refused() -> None:
    lie = fixed(member(CHUNK)[:124] + b"\xff" * 12 + member(CHUNK)[136:])
    with pytest.raises(BadInput):
        imported(archive_of(lie))


@pytest.mark.parametrize(
    "data", [b"", b"dear", bytes(1024), member("notes.txt", b"dear") + bytes(1024), b"\x9c" * 4096]
)
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="archive"):
        imported(data)


def test_another_version_is_refused() -> None:
    with pytest.raises(BadInput, match="another version"):
        imported(member(MARKER, b'{"cakekv_archive": 2}') + bytes(1024))


def test_an_archive_that_is_cut_off_is_noticed_wherever(archive: bytes) -> None:
    ends = random.Random(3).sample(range(len(archive) - 1024), 40)
    for end in [*ends, len(archive) - 1024]:
        store = MemoryStore()
        with pytest.raises(BadInput, match="archive"):
            import_archive(io.BytesIO(archive[:end]), store)
        assert all(read(store, chunk.key) in [chunk_of(number) for number in range(3)] for chunk in store)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_whatever_is_changed_no_wrong_chunk_gets_in(archive: bytes, changes: Any) -> None:
    data = bytearray(archive)
    for at, mask in changes:
        data[at % len(data)] ^= mask
    store = MemoryStore()
    with suppress(BadInput):
        import_archive(io.BytesIO(bytes(data)), store)
    expected = {key_of(number): chunk_of(number) for number in range(3)}
    assert all(read(store, chunk.key) == expected[chunk.key] for chunk in store)
