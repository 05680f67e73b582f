"""What gets to the front of a tiered store, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, StoreError
from cakekv.store.base import Store
from cakekv.store.disk import DiskStore
from cakekv.store.maintenance.warm import warm
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.redis import RedisStore
from cakekv.store.tiered import TieredStore, TierPlan, Writing
from tests.store.chunks import SIZE, chunk_of, key_of, opener, read
from tests.store.conftest import Servers


def fill(store: Store, numbers: Any) -> None:
    for number in numbers:
        store.write(key_of(number), chunk_of(number))


def held(store: Store) -> set[Any]:
    return {number for number in range(20) if store.lookup([key_of(number)]) != [None]}


@pytest.fixture
def tiered() -> Iterator[Callable[..., Any]]:
    opened = []

    def made(*tiers: Any, promote: bool = True) -> Any:
        plan = [TierPlan(Member(opener(store), store.name), Writing.THROUGH, promote) for store in tiers]
        opened.append(TieredStore(plan))
        return opened[-1]

    yield made
    for store in opened:
        store.close()


def test_what_is_free_is_filled_with_what_was_used_last(tiered: Callable[..., Any], tmp_path: Path) -> None:
    front, back = DiskStore(tmp_path / "front", 4 * SIZE), DiskStore(tmp_path / "back")
    fill(back, range(6))
    fill(front, [19])
    back.open(key_of(0)).close()
    [warmed] = warm(tiered(front, back))
    assert held(front) == {19, 0, 5, 4}
    assert (warmed.copied.chunks, warmed.copied.bytes) == (3, 3 * SIZE)
    assert min(front, key=lambda chunk: chunk.used_at).key == key_of(19)
    assert read(front, key_of(4)) == chunk_of(4)
    assert held(back) == set(range(6))
    assert warm(tiered(front, back))[0].copied.chunks == 0


def test_so_many_bytes_or_keys(tiered: Callable[..., Any], tmp_path: Path) -> None:
    front, back = DiskStore(tmp_path / "front"), DiskStore(tmp_path / "back")
    fill(back, range(6))
    warm(tiered(front, back), limit_bytes=2 * SIZE)
    assert held(front) == {4, 5}
    warm(tiered(front, back), {key_of(1), key_of(18)})
    assert held(front) == {1, 4, 5}


def test_a_tier_without_a_capacity_wants_to_know_how_much(tiered: Callable[..., Any], tmp_path: Path) -> None:
    store = tiered(DiskStore(tmp_path / "front"), DiskStore(tmp_path / "back"))
    with pytest.raises(BadInput, match="how many bytes"):
        warm(store)


def test_from_the_last_tier_to_the_first(tiered: Callable[..., Any], tmp_path: Path, shared: Servers) -> None:
    memory, disk = MemoryStore(2 * SIZE), DiskStore(tmp_path / "kv", 3 * SIZE)
    with RedisStore("127.0.0.1", shared.valkey, prefix=f"{tmp_path}:") as server:
        fill(server, range(5))
        warmed = warm(tiered(memory, disk, server))
        assert [one.copied.chunks for one in warmed] == [3, 2]
        assert len(held(disk)) == 3
        assert len(held(memory)) == 2
        memory.delete([chunk.key for chunk in memory])
        [_, skipped] = warm(tiered(memory, disk, server), memory=False)
        assert (skipped.tier, skipped.copied) == ("memory", None)
        assert held(memory) == set()


def test_only_tiers_that_take_promotions(tiered: Callable[..., Any], tmp_path: Path) -> None:
    front, back = DiskStore(tmp_path / "front", 4 * SIZE), DiskStore(tmp_path / "back")
    fill(back, range(2))
    assert warm(tiered(front, back, promote=False)) == []
    assert held(front) == set()


def test_a_tier_that_fails_is_named(tiered: Callable[..., Any], tmp_path: Path) -> None:
    def fail() -> Store:
        raise StoreError("nobody answers")

    disk = DiskStore(tmp_path / "kv", 4 * SIZE)
    fill(disk, [0])
    with TieredStore([TierPlan(Member(fail, "front")), TierPlan(Member(lambda: disk, "disk"))]) as store:
        [warmed] = warm(store)
    assert warmed.failed
    assert "nobody answers" in warmed.note


def test_other_stores_have_nothing_to_warm() -> None:
    with pytest.raises(BadInput, match="tiered"):
        warm(MemoryStore())
