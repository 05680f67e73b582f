"""Encryption at rest: what is sealed opens with the right key only, whole and in parts, and every change is found."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.errors import BadInput, ChunkFault, CorruptChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.store import encrypted
from cakekv.store.base import Store
from cakekv.store.encrypted import BLOCK_BYTES, EncryptedStore
from cakekv.store.keyring import Keyring, read_keyring
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store

from .chunks import SIZE, chunk_of, key_of, part_of, read

KEYS = [bytes([number]) * 32 for number in range(3)]
LARGE = 3 * BLOCK_BYTES + 5000
DATA = memoryview(random.Random(7).randbytes(LARGE))


def sealed(inner: Store, key: ChunkKey) -> Any:
    """The bytes in the inner store, to be changed."""
    return bytearray(read(inner, key))


@pytest.fixture
def inner() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(inner: MemoryStore) -> EncryptedStore:
    return EncryptedStore(inner, Keyring(KEYS[:1]))


def test_nothing_of_a_chunk_shows(inner: MemoryStore, store: EncryptedStore) -> None:
    store.write(key_of(0), chunk_of(0))
    stored = bytes(sealed(inner, key_of(0)))
    plain = bytes(chunk_of(0))
    assert not any(plain[start : start + 16] in stored for start in range(4096, 12000, 64))
    store.write(key_of(0), chunk_of(0))
    assert bytes(sealed(inner, key_of(0))) != stored, "no two sealings are alike"
    assert read(store, key_of(0)) == plain


@settings(deadline=None)
@given(
    st.integers(0, LARGE + 10), st.integers(0, LARGE), st.sampled_from([1, 1000, 4096, BLOCK_BYTES, 2 * BLOCK_BYTES])
)
def test_any_part_can_be_read(start: int, length: Any, step: Any) -> None:
    store = EncryptedStore(_FILLED, Keyring(KEYS[:1]))
    step = max(step, length // 50)
    with store.open(key_of(0)) as reader:
        assert reader.size == LARGE
        buffer = memoryview(bytearray(length))
        for offset in range(0, length, step):
            part = buffer[offset : offset + step]
            count = reader.read_into(part, start + offset)
            assert count == max(0, min(len(part), LARGE - start - offset))
        expected = DATA[start : start + length]
        assert buffer[: len(expected)] == expected


_FILLED = MemoryStore()
EncryptedStore(_FILLED, Keyring(KEYS[:1])).write(key_of(0), DATA)


@settings(deadline=None)
@given(st.integers(1, 10**12))
def test_lengths_are_told_from_those_of_sealed_chunks(size: int) -> None:
    assert encrypted._plain_bytes(encrypted._data_offset(size, BLOCK_BYTES) + size) == size


@pytest.mark.parametrize("seed", range(60))
def test_every_flipped_bit_is_found(inner: MemoryStore, store: EncryptedStore, seed: int) -> None:
    store.write(key_of(0), DATA)
    data = sealed(inner, key_of(0))
    choose = random.Random(seed)
    place = choose.choice([choose.randrange(48), choose.randrange(4096), choose.randrange(len(data))])
    data[place] ^= 1 << choose.randrange(8)
    inner.write(key_of(0), memoryview(data))
    with pytest.raises((CorruptChunk, StoreError)) as caught:
        read(store, key_of(0))
    if isinstance(caught.value, CorruptChunk):
        assert caught.value.fault is ChunkFault.SEAL
    else:
        assert "not in the keyring" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 47, 48, 4095, 4096, 5000, LARGE])
def test_truncated_and_foreign_chunks_are_found(inner: MemoryStore, store: EncryptedStore, length: int) -> None:
    store.write(key_of(0), DATA)
    for data in (sealed(inner, key_of(0))[:length], os.urandom(length)):
        inner.write(key_of(0), memoryview(bytearray(data)))
        with pytest.raises(CorruptChunk):
            store.open(key_of(0))


def test_a_chunk_in_anothers_place_is_found(inner: MemoryStore, store: EncryptedStore) -> None:
    store.write(key_of(0), DATA)
    inner.write(key_of(1), memoryview(sealed(inner, key_of(0))))
    with pytest.raises(CorruptChunk):
        read(store, key_of(1))


def test_blocks_that_changed_places_are_found(inner: MemoryStore, store: EncryptedStore) -> None:
    store.write(key_of(0), DATA)
    data = sealed(inner, key_of(0))
    start, first, second = 4096, slice(48, 64), slice(64, 80)
    blocks = [slice(start + number * BLOCK_BYTES, start + (number + 1) * BLOCK_BYTES) for number in range(2)]
    data[first], data[second] = data[second], data[first]
    data[blocks[0]], data[blocks[1]] = data[blocks[1]], data[blocks[0]]
    inner.write(key_of(0), memoryview(data))
    with pytest.raises(CorruptChunk):
        read(store, key_of(0))


def test_nothing_that_was_not_authenticated_is_handed_out(inner: MemoryStore, store: EncryptedStore) -> None:
    store.write(key_of(0), DATA)
    data = sealed(inner, key_of(0))
    data[-1] ^= 1
    inner.write(key_of(0), memoryview(data))
    buffer = memoryview(bytearray(LARGE))
    with store.open(key_of(0)) as reader, pytest.raises(CorruptChunk):
        reader.read_into(buffer, 0)
    assert not any(buffer[3 * BLOCK_BYTES :])


def test_keys_rotate(inner: MemoryStore) -> None:
    EncryptedStore(inner, Keyring(KEYS[:1])).write(key_of(0), chunk_of(0))
    rotated = EncryptedStore(inner, Keyring([KEYS[1], KEYS[0]]))
    assert read(rotated, key_of(0)) == chunk_of(0)
    rotated.write(key_of(1), chunk_of(1))
    newest = EncryptedStore(inner, Keyring(KEYS[1:2]))
    assert read(newest, key_of(1)) == chunk_of(1)
    with pytest.raises(StoreError, match="not in the keyring"):
        newest.open(key_of(0))


def test_tenants_do_not_open_each_others_chunks(inner: MemoryStore) -> None:
    ours, theirs = (EncryptedStore(inner, Keyring(KEYS[:1], tenant)) for tenant in ("a", "b"))
    ours.write(key_of(0), chunk_of(0))
    assert read(ours, key_of(0)) == chunk_of(0)
    with pytest.raises(StoreError, match="not in the keyring"):
        theirs.open(key_of(0))


def test_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# newest first\n{KEYS[1].hex()}\n\n{KEYS[0].hex().upper()}\n")
    file.chmod(0o600)
    url = f"file://{tmp_path}/store?encrypt={file}"
    with open_store(url) as store:
        store.write(key_of(0), chunk_of(0))
        assert store.lookup([key_of(0)]) == [SIZE]
    monkeypatch.setenv("KV_KEYS", KEYS[1].hex())
    with open_store(f"file://{tmp_path}/store?encrypt=env:KV_KEYS") as store:
        assert read(store, key_of(0)) == chunk_of(0)
        assert KEYS[1].hex() not in repr(part_of(store, EncryptedStore)._keyring)


def test_bad_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS[0].hex())
    file.chmod(0o644)
    with pytest.raises(BadInput, match="chmod 600"):
        read_keyring(str(file))
    file.chmod(0o600)
    for text in ("", "hush", KEYS[0].hex()[:-1], KEYS[0].hex() + "\nhush"):
        file.write_text(text)
        with pytest.raises(BadInput, match="64 hexadecimal digits") as caught:
            read_keyring(str(file))
        assert "hush" not in str(caught.value)
    with pytest.raises(BadInput, match="cannot read"):
        read_keyring(str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="no NOWHERE in the environment"):
        read_keyring("env:NOWHERE")
    with pytest.raises(BadInput, match="at least one key"):
        Keyring([b"short"])
