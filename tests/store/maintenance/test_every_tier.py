"""What maintenance does to every kind of store: verifying, copying, exporting, collecting."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import MissingChunk
from cakekv.store.base import Store
from cakekv.store.maintenance.archive import export, import_archive
from cakekv.store.maintenance.collect import delete, garbage
from cakekv.store.maintenance.copying import copy
from cakekv.store.maintenance.verify import repair, verify
from cakekv.store.maintenance.walking import leave_no_trace, newest
from cakekv.store.memory import MemoryStore
from tests.store.chunks import SIZE, chunk_of, key_of, read
from tests.store.conftest import Servers
from tests.store.test_contract import TIERS

KINDS = ["disk", "striped", "encrypted", "tiered", "redis", "s3"]
ROOT = key_of(99).hex()
FIELDS = {"dtype": "float32", "weights": "é"}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, shared: Servers) -> Iterator[Store]:
    """A store of three chunks."""
    with TIERS[request.param].open(tmp_path, None, shared) as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
        store.remember_identity(ROOT, FIELDS)
        leave_no_trace(store)
        yield store


def keys(store: Store) -> set[Any]:
    return {chunk.key for chunk in store}


def spoil(store: Store, number: int) -> None:
    """A chunk under the wrong name, as nothing but its content tells."""
    store.write(key_of(number), chunk_of(number + 1))


def test_verifying_and_repairing(store: Store) -> None:
    tiers = len(verify(store))
    assert [one.chunks for one in verify(store)] == [3] * tiers
    spoil(store, 1)
    seen: list[Any] = []
    found = verify(store, seen.append)
    assert [list(one.corrupt) for one in found] == [[key_of(1)]] * tiers
    assert all("another key" in one.corrupt[key_of(1)] for one in found)
    assert sum(seen) == sum(one.bytes for one in found) >= 3 * SIZE * tiers
    assert keys(store) == {key_of(0), key_of(1), key_of(2)}, "verifying changes nothing"
    assert [done.deleted for done in repair(store)] == [1] * tiers
    assert keys(store) == {key_of(0), key_of(2)}
    assert not any(one.corrupt for one in verify(store))


def test_copying_there_and_back(store: Store, tmp_path: Path) -> None:
    spoil(store, 1)
    other = MemoryStore()
    copied = copy(store, other)
    assert (copied.chunks, copied.bytes, copied.present, list(copied.corrupt)) == (2, 2 * SIZE, 0, [key_of(1)])
    assert {key: read(other, key) for key in keys(other)} == {key_of(n): chunk_of(n) for n in (0, 2)}
    assert other.identities() == {ROOT: FIELDS}

    other.write(key_of(7), chunk_of(7))
    seen: list[Any] = []
    copied = copy(other, store, on_bytes=seen.append)
    assert (copied.chunks, copied.present, copied.corrupt) == (1, 2, {})
    assert sum(seen) == 3 * SIZE
    assert read(store, key_of(7)) == chunk_of(7)


def test_exporting_and_importing(store: Store, tmp_path: Path) -> None:
    stream = io.BytesIO()
    assert export(store, stream).chunks == 3
    stream.seek(0)
    other = MemoryStore()
    imported = import_archive(stream, other)
    assert (imported.chunks, imported.bytes, imported.identities, imported.corrupt) == (3, 3 * SIZE, 1, {})
    assert {key: read(other, key) for key in keys(other)} == {key_of(n): chunk_of(n) for n in range(3)}
    assert other.identities() == {ROOT: FIELDS}
    stream.seek(0)
    assert import_archive(stream, store).present == 3
    store.delete([key_of(1)])
    stream.seek(0)
    assert import_archive(stream, store).chunks == 1
    assert read(store, key_of(1)) == chunk_of(1)


def test_collecting(store: Store) -> None:
    now = time.time()
    going = garbage(store, now, capacity=2 * SIZE + 9000, older_than_s=3600)
    assert (going.old, len(going.surplus)) == ([], 1)
    assert keys(store) == {key_of(0), key_of(1), key_of(2)}, "choosing changes nothing"
    assert delete(store, going.surplus) == 1
    assert keys(store) == {key_of(0), key_of(1), key_of(2)} - {going.surplus[0].key}
    going = garbage(store, now + 7200, older_than_s=3600)
    assert {chunk.key for chunk in going.old} == keys(store)
    assert delete(store, going.old) == 2
    assert keys(store) == set()


def test_looking_at_a_chunk_leaves_no_trace(store: Any) -> None:
    if store.name == "redis":
        for name in [store.name_of(key_of(number)) for number in range(3)]:
            store._server.client.restore(name, 0, store._server.client.dump(name), replace=True, idletime=1000)
    before = {chunk.key: chunk.used_at for chunk in store}
    verify(store)
    export(store, io.BytesIO())
    copy(store, MemoryStore())
    with pytest.raises(MissingChunk):
        store.open(key_of(50))
    store.stats()
    after = {chunk.key: chunk.used_at for chunk in store}
    assert after == pytest.approx(before, abs=15 if store.name == "redis" else 0)


def test_the_newest_that_fit() -> None:
    store = MemoryStore()
    for number in range(4):
        store.write(key_of(number), chunk_of(number))
        store.policy.get(key_of(number)).used_at = float(number)
    assert [chunk.key for chunk in newest(store, 2 * SIZE + 1)] == [key_of(3), key_of(2)]
    assert len(newest(store)) == 4
