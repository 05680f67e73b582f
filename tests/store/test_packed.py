"""Packing where it pays: what is written in which form, and that it comes back bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cakekv.chunk import Form, is_packed, peek_form, verify_chunk
from cakekv.errors import BadInput
from cakekv.packed_chunk import pack_chunk, unpack_chunk
from cakekv.store.base import Store
from cakekv.store.disk import DiskStore
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.keyring import Keyring
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.packed import Pack, PackedStore, PackingChoice, Unpacking, packers
from cakekv.store.throttled import ThrottledStore
from cakekv.store.tiered import TieredStore, TierPlan

from .chunks import PACKABLE, SHAPE, SIZE, chunk_of, coded_chunk_of, key_of, opener, packable_chunk_of, part_of, read
from .conftest import Servers

RAW, KEY = packable_chunk_of(0), key_of(0)


def packed_of(number: int) -> memoryview:
    packed = pack_chunk(packable_chunk_of(number))
    assert packed is not None
    return packed


def unpacking(bandwidth: float) -> Unpacking:
    known = Unpacking()
    known.bandwidth = bandwidth
    return known


@pytest.mark.parametrize("kind", ["memory", "disk", "striped", "redis", "s3", "encrypted"])
def test_a_store_packs_and_unpacks(kind: str, tmp_path: Path, shared: Servers) -> None:
    (tmp_path / "keys").write_text(bytes(32).hex())
    (tmp_path / "keys").chmod(0o600)
    url = {
        "memory": "memory://?",
        "disk": f"file://{tmp_path}/kv?",
        "striped": f"file://{tmp_path}/a?stripe={tmp_path}/b&",
        "redis": f"redis://127.0.0.1:{shared.valkey}?prefix={tmp_path}:&",
        "s3": f"s3://bucket{tmp_path}?endpoint={shared.s3}&http=true&" if kind == "s3" else "",
        "encrypted": f"file://{tmp_path}/sealed?encrypt={tmp_path}/keys&",
    }[kind]
    with open_store(f"{url}pack=yes") as store:
        assert store.write(KEY, RAW)
        [size] = store.lookup([KEY])
        assert size is not None
        assert is_packed(size)
        stored = memoryview(bytearray(read(store, KEY)))
        assert len(stored) == size < 0.9 * len(RAW)
        assert unpack_chunk(stored) == RAW
        assert store.stats().bytes < 0.9 * len(RAW)
        if kind == "memory":
            return
    with open_store(f"{url}pack=no") as other:
        assert read(other, KEY) == stored  # nothing is rewritten by itself
        assert other.write(KEY, stored)
        assert read(other, KEY) == RAW
        assert other.lookup([KEY]) == [len(RAW)]


@pytest.mark.parametrize("pack", Pack)
def test_what_is_no_exact_chunk_is_written_as_it_is(pack: Pack) -> None:
    store = PackedStore(MemoryStore(), pack, PackingChoice(packs=True))
    coded = coded_chunk_of(0)
    for data in (coded, memoryview(b"\x89CAKESEA" + bytes(9000)), memoryview(b"short"), chunk_of(1)):
        assert store.write(KEY, data)
        assert read(store, KEY) == data
    assert store.unformed == 0


def test_a_damaged_chunk_is_not_sealed_anew(caplog: pytest.LogCaptureFixture) -> None:
    raw, packed = packable_chunk_of(1), packed_of(1)
    raw[6000] ^= 1
    packed[6000] ^= 1
    packs, unpacks = PackedStore(MemoryStore(), Pack.YES), PackedStore(MemoryStore(), Pack.NO)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert packs.write(KEY, raw)
            assert unpacks.write(KEY, packed)
    assert read(packs, KEY) == raw
    assert read(unpacks, KEY) == packed
    assert (packs.unformed, unpacks.unformed) == (3, 3)
    assert caplog.text.count("not_packed") == 2  # said once


@pytest.mark.parametrize(
    ("url", "packs"),
    [
        ("memory://", False),
        ("memory://?bandwidth=1MB/s", False),
        ("file://{}/kv", False),
        ("file://{}/kv?bandwidth=1MB/s", True),
        ("file://{}/kv?bandwidth=100GB/s", False),
        ("file://{}/kv?bandwidth=1MB/s&pack=no", False),
        ("redis://127.0.0.1:{}", True),
        ("redis://127.0.0.1:{}?bandwidth=100GB/s", False),
        ("redis://127.0.0.1:{}?pack=auto", True),
    ],
)
def test_auto_begins_with_the_kind_of_tier(url: str, packs: bool, tmp_path: Path, shared: Servers) -> None:
    with open_store(url.format(shared.valkey if url.startswith("redis") else tmp_path)) as store:
        for _ in range(2):  # the first one written tells how fast chunks are unpacked
            store.write(KEY, RAW)
        form = peek_form(read(store, KEY))
        store.delete([KEY])
    assert form is (Form.PACKED if packs else Form.EXACT)


def test_auto_follows_the_bandwidth_and_does_not_flip() -> None:
    choice = PackingChoice(packs=False, unpacking=unpacking(1e9))
    assert not choice.packs()
    decisions = []
    for bandwidth in (2e9, 310e6, 100e6, 290e6, 310e6, 380e6, 2e9, 290e6):
        choice.reads.expect(bandwidth)
        decisions.append(choice.packs())
    assert decisions == [False, False, True, True, True, True, False, False]


def test_auto_stops_where_nothing_is_saved() -> None:
    choice = PackingChoice(packs=True, bandwidth=50e6, unpacking=unpacking(1e9))
    assert choice.packs()
    for _ in range(40):
        choice.packed(SIZE, None)
    assert not choice.packs()


def test_auto_sees_how_fast_it_is_read() -> None:
    slow = ThrottledStore(MemoryStore(), 20e6)
    store = PackedStore(slow, Pack.AUTO, PackingChoice(packs=False, unpacking=unpacking(1e9)))
    store.write(KEY, RAW)
    assert read(store, KEY) == RAW
    while not store.packs:
        read(store, KEY)
    store.write(KEY, RAW)
    assert read(store, KEY) == packed_of(0)


def test_what_is_known_of_a_tier_counts_until_it_is_read() -> None:
    store = PackedStore(MemoryStore(), Pack.AUTO, PackingChoice(packs=True, unpacking=unpacking(1e9)))
    store.expect_bandwidth(20e9)
    store.write(KEY, RAW)
    assert read(store, KEY) == RAW


def test_two_who_disagree_about_one_folder(tmp_path: Path) -> None:
    with open_store(f"{tmp_path}/kv?pack=yes") as one, open_store(f"{tmp_path}/kv?pack=no") as other:
        one.write(KEY, RAW)
        other.write(key_of(1), packable_chunk_of(1))
        for store in (one, other):
            assert unpack_chunk(memoryview(bytearray(read(store, KEY)))) == RAW
            assert read(store, key_of(1)) == packable_chunk_of(1)


def tiered(*inner: Store) -> TieredStore:
    return TieredStore([TierPlan(Member(opener(store), store.name)) for store in inner])


def test_each_tier_has_its_own_form() -> None:
    front, back = PackedStore(MemoryStore(), Pack.AUTO), PackedStore(MemoryStore(), Pack.YES)
    with tiered(front, back) as store:
        store.write(KEY, RAW)
        assert read(front, KEY) == RAW
        assert read(back, KEY) == packed_of(0)
        front.delete([KEY])
        read(store, KEY)  # promotes it
        store.flush()
        assert read(front, KEY) == RAW


def test_in_a_composition(tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    text = f'[[tier]]\nurl = "file://{tmp_path}/a"\n[[tier]]\nurl = "file://{tmp_path}/b"\n'

    def forms(pack: str, url: str = f"tiered://{file}") -> list[Form | None]:
        file.write_text(f"{text}{pack}")
        with open_store(url) as store:
            assert isinstance(store, TieredStore)
            store.write(KEY, RAW)
            found = [peek_form(read(member, KEY)) for member in store.members]
            store.delete([KEY])
            return found

    assert forms("") == [Form.EXACT, Form.EXACT]
    assert forms('pack = "yes"') == [Form.EXACT, Form.PACKED]
    assert forms("", f"tiered://{file}?pack=yes") == [Form.PACKED, Form.PACKED]
    assert forms('pack = "no"', f"tiered://{file}?pack=yes") == [Form.PACKED, Form.EXACT]
    for pack, message in [('pack = "maybe"', "'maybe' is none of auto, yes, no"), ("pack = true", "a string")]:
        with pytest.raises(BadInput, match=message):
            forms(pack)
    file.write_text(f'[[tier]]\nurl = "file://{tmp_path}/a?pack=no"\npack = "yes"\n')
    with pytest.raises(BadInput, match="says twice"):
        open_store(f"tiered://{file}")
    with pytest.raises(BadInput, match=r"option 'pack'.*none of auto, yes, no"):
        open_store("memory://?pack=perhaps")


def test_chunks_are_packed_before_they_are_sealed() -> None:
    inner = MemoryStore()
    store = PackedStore(EncryptedStore(inner, Keyring([bytes(32)])), Pack.YES)
    store.write(KEY, RAW)
    assert peek_form(read(inner, KEY)) is None
    assert inner.stats().bytes < 0.9 * len(RAW)
    assert unpack_chunk(memoryview(bytearray(read(store, KEY)))) == RAW
    assert next(iter(store)).size == store.lookup([KEY])[0]


def test_parts_of_a_packed_chunk_can_be_read_past_the_page_cache(tmp_path: Path) -> None:
    """Direct reads want multiples of 4096, and the length of a packed chunk is none."""
    with PackedStore(DiskStore(tmp_path), Pack.YES) as store:
        store.write(KEY, RAW)
        whole = read(store, KEY)
        part_of(store, DiskStore)._folder.file(KEY)
        with store.open(KEY) as reader:
            buffer = memoryview(bytearray(len(whole) + 4096))
            assert reader.read_into(buffer[4096:], 4096) == len(whole) - 4096
            assert buffer[4096 : len(whole)] == whole[4096:]


def test_it_survives_a_fork_as_its_store_does(tmp_path: Path) -> None:
    with open_store(f"{tmp_path}/kv") as store:
        assert store.survives_fork()
    with open_store("memory://?bandwidth=1MB/s") as store:
        assert not store.survives_fork()


@pytest.mark.usefixtures("without_numba")
def test_without_numba(tmp_path: Path, shared: Servers, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadInput, match=r"option 'pack'.*pip install 'cakekv\[codecs\]'"):
        open_store(f"{tmp_path}/kv?pack=yes")
    assert not (tmp_path / "kv").exists()
    with (
        caplog.at_level(logging.INFO),
        open_store(f"redis://127.0.0.1:{shared.valkey}?prefix={tmp_path}:") as store,
    ):
        for number in range(2):
            assert store.write(key_of(number), packable_chunk_of(number))
            assert read(store, key_of(number)) == packable_chunk_of(number)
    assert caplog.text.count("not_packed") == 1
    assert "pip install" in caplog.text


def test_packed_chunks_wait_for_whoever_has_numba(request: pytest.FixtureRequest) -> None:
    packed = packed_of(0)
    store = PackedStore(MemoryStore(), Pack.NO)
    request.getfixturevalue("without_numba")
    store.write(KEY, packed)
    assert read(store, KEY) == packed


def test_everything_else_is_passed_on(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/kv?capacity=1MB")
    [packer] = packers(store)
    assert (store.name, store.parallel_reads, store.counts_cheaply) == ("disk", 4, True)
    assert packer.pack is Pack.AUTO
    assert store.stats().capacity == 10**6
    store.write(KEY, RAW)
    verify_chunk(memoryview(bytearray(read(store, KEY))))
    assert store.delete([KEY]) == 1
    removals = store.removals([KEY])
    assert removals is not None
    assert KEY in removals
    assert PACKABLE.tokens == SHAPE.tokens
