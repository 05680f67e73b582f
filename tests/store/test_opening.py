"""Stores by URL, and what the messages say when there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cakekv.errors import BadInput, StoreError
from cakekv.store import opening
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import check_urls, open_store
from cakekv.store.throttled import ThrottledStore

from .chunks import part_of


def test_memory() -> None:
    store = part_of(open_store("memory://?capacity=2GB"), MemoryStore)
    assert store.capacity == 2 * 10**9
    assert open_store("memory://").stats().capacity is None


def test_file(tmp_path: Path) -> None:
    store = part_of(open_store(f"file://{tmp_path}/a%20b?capacity=10MiB"), DiskStore)
    assert store.path == tmp_path / "a b"
    assert store.capacity == 10 * 2**20


def path_of(url: str) -> Path:
    return part_of(open_store(url), DiskStore).path


def test_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert path_of("here") == tmp_path / "here"
    assert path_of("~/there?capacity=1MB") == tmp_path / "home" / "there"
    assert path_of(str(tmp_path / "100%25")) == tmp_path / "100%25"


def test_a_link() -> None:
    store = part_of(open_store("memory://?bandwidth=50MB/s&latency=2ms&capacity=1GB"), ThrottledStore)
    assert (store.bandwidth, store.latency_s) == (50e6, 0.002)
    assert store.stats().capacity == 10**9
    late = part_of(open_store("memory://?latency=1s"), ThrottledStore)
    assert late.bandwidth == float("inf")
    with pytest.raises(ValueError, match="unpack"):
        part_of(open_store("memory://?bandwidth=unlimited"), ThrottledStore)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "neither a path nor"),
        ("?capacity=1GB", "neither a path nor"),
        ("memory:", "neither a path nor"),
        ("file:/x", "neither a path nor"),
        ("ftp://host", "unknown kind of store 'ftp'.*there are az, file, gs, memory, mooncake, redis"),
        ("memory://host", "has no place"),
        ("file://relative/path", "not absolute"),
        ("file://", "not absolute"),
        ("memory://?size=1GB", "unknown option 'size'.*there are bandwidth, capacity, encrypt, evict, faults, latency"),
        ("memory://?capacity=1GB&capacity=2GB", "'capacity' is given twice"),
        ("memory://?capacity=big", "option 'capacity'.*such as \"10GB\""),
        ("memory://?capacity", "option 'capacity'.*such as \"10GB\""),
        ("memory://?bandwidth=fast", "option 'bandwidth'.*such as \"50MB/s\""),
        ("memory://?latency=long", "option 'latency'.*such as \"2ms\""),
        ("memory://?latency=99999999999d", "longer than thirty years"),
        ("file:///a%00b", "zero byte"),
        ("~nobody-of-this-name/kv", "no such user"),
    ],
)
def test_bad_urls_are_told_what_is_wrong(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        open_store(url)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="give another path"):
        open_store(str(tmp_path / "file"))


def test_its_url_names_what_decides_its_speed_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_store(f"file://{tmp_path}/a@b")
    assert plain.url is not None
    assert f"file://{tmp_path}/a@b" in plain.url
    assert open_store(f"{tmp_path}/a@b?capacity=1GB").url == plain.url
    assert open_store(f"{tmp_path}/a@b?bandwidth=1MB/s").url != plain.url
    assert open_store(f"{tmp_path}/a@b?latency=1ms").url != plain.url
    remote = opening.Tier(lambda location, **options: MemoryStore(), {"token": str})
    monkeypatch.setitem(opening.TIERS, "remote", remote)
    url = open_store("remote://me:secret@host:80/bucket?token=hidden").url
    assert url is not None
    assert "host:80/bucket" in url
    assert "me" not in url
    assert "secret" not in url
    assert "hidden" not in url
    assert MemoryStore().url is None


def test_a_url_is_checked_without_opening(tmp_path: Path) -> None:
    check_urls([f"{tmp_path}/new?capacity=1GB"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(BadInput, match="unknown option 'size'"):
        check_urls([f"{tmp_path}/new?size=1GB"])


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:se?cret@host",
        "redis://me:s@e?cr@host/0",
        "redis:me:secret@host",
        "redis:/me:secret@host",
    ],
)
def test_no_part_of_a_password_is_shown(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_urls([url])
    assert not re.search("se|cr|me:", str(caught.value).replace("memory", ""))
