"""Tiered stores from files: what they say, and what is wrong with those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cakekv.errors import BadInput, StoreError
from cakekv.store.disk import DiskStore
from cakekv.store.opening import open_store
from tests.store.conftest import Servers

from .chunks import SIZE, chunk_of, key_of


def test_a_file(tmp_path: Path, shared: Servers) -> None:
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://?capacity=1GB"

        [[tier]]
        url = "{tmp_path}/disk"
        write = "back"

        [[tier]]
        url = "redis://127.0.0.1:{shared.valkey}?prefix=tiered:"
        write = "never"
        promote = false
        deadline = "200ms"
    """)
    with open_store(f"tiered://{tmp_path}/kv.toml") as store:
        assert [tier.name for tier in store.tiers] == ["memory", "disk", "redis"]
        store.write(key_of(0), chunk_of(0))
    assert DiskStore(tmp_path / "disk").stats().chunks == 1


def test_a_tier_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text("""
        [[tier]]
        url = "memory://"
        [[tier]]
        url = "redis://me:hush@127.0.0.1:1"
    """)
    with open_store(f"tiered://{tmp_path}/kv.toml") as store:
        assert store.write(key_of(0), chunk_of(0))
        assert store.lookup([key_of(0)]) == [SIZE]
        with pytest.raises(StoreError, match="the redis tier is down") as caught:
            store.tiers[1].lookup([key_of(0)])
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"one \[\[tier\]\] for each"),
        ("tier = 5", r"one \[\[tier\]\] for each"),
        ("tier = [5]", "has no url"),
        ("[[tier]]\nurl = 'memory://'\n[other]", r"one \[\[tier\]\] for each"),
        ("[[tier", "is not TOML"),
        ("[[tier]]", "tier 1 in .* has no url"),
        ("[[tier]]\nurl = 5", "url should be a string"),
        ("[[tier]]\nurl = 'memory://'\nsize = 5", "unknown key 'size'"),
        ("[[tier]]\nurl = 'memory://'\npromote = 'no'", "promote should be true or false"),
        ("[[tier]]\nurl = 'memory://'\nwrite = 'no'", "write is one of through, back, never"),
        ("[[tier]]\nurl = 'memory://'\ndeadline = '0s'", "more than 0"),
        ("[[tier]]\nurl = 'memory://'\ndeadline = '5'", "not a duration"),
        ("[[tier]]\nurl = 'memory://'\nwrite = 'back'", "written through"),
        ("[[tier]]\nurl = 'memory://'\n[[tier]]\nurl = 'ftp://x'", "unknown kind of store"),
        ("[[tier]]\nurl = 'tiered:///x'", "list its tiers here instead"),
        ("#" * 70_000, "longer than"),
    ],
)
def test_bad_files_are_told_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "kv.toml").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_store(f"tiered://{tmp_path}/kv.toml")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read"):
        open_store(f"tiered://{tmp_path}/kv.toml")
    with pytest.raises(BadInput, match="not absolute"):
        open_store("tiered://kv.toml")
