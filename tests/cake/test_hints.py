"""Hints: prompts are pinned, released and fetched as callers ask, across processes and tiers."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.errors import BadInput, CannotPin, PinRefused
from cakekv.store.disk import DiskStore
from cakekv.store.eviction import policy_named
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.tiered import TieredStore, TierPlan
from tests.store.chunks import key_of, opener

CHUNK = 16


@pytest.fixture
def chunk_bytes(engine: Any, prompt: Any) -> int:
    store = MemoryStore()
    with cake_of(engine, store) as cake:
        cake.prefill(prompt[: CHUNK + 1])
        cake.wait_saved()
    return store.stats().bytes


def cake_of(engine: Any, store: Any) -> Cake:
    return Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=CHUNK)


def others(prompt: list[int], count: int) -> list[list[int]]:
    return [[(token + shift) % 211 for token in prompt] for shift in range(1, count + 1)]


@pytest.mark.parametrize("first", ["pin", "prefill"])
def test_a_pinned_prompt_is_restored_though_the_store_is_full(
    first: str, engine: Any, prompt: Any, chunk_bytes: int, tmp_path: Path
) -> None:
    url = f"{tmp_path}/store?capacity={50 * chunk_bytes}"
    with cake_of(engine, url) as cake:
        if first == "prefill":
            cake.prefill(prompt)
            cake.wait_saved()
        pinned = cake.pin(prompt, ttl_s=600)
        assert (pinned.chunks, pinned.tiers, pinned.refused) == (20, ("disk",), {})
        if first == "pin":
            cake.prefill(prompt)
        for other in others(prompt, 4):
            cake.prefill(other)
            cake.wait_saved()
        with pytest.raises(PinRefused, match="pin_share"):
            cake.pin(others(prompt, 1)[0], ttl_s=600)
    with cake_of(engine, url) as cake:
        assert cake.prefill(prompt, mode="load").report.loaded_tokens == 20 * CHUNK
        assert cake.release(prompt)
        assert not cake.release(prompt)
        for other in others(prompt, 4):
            cake.prefill(other)
            cake.wait_saved()
        assert cake.prefill(prompt, mode="load").report.loaded_tokens < 20 * CHUNK


def test_what_is_fetched_is_in_the_fastest_tier(engine: Any, prompt: Any, tmp_path: Path) -> None:
    memory, disk = MemoryStore(), DiskStore(tmp_path / "disk")
    with cake_of(engine, disk) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
    plan = [TierPlan(Member(opener(store), store.name)) for store in (memory, disk)]
    with TieredStore(plan) as tiered, cake_of(engine, tiered) as cake:
        coming = cake.prefetch(prompt)
        assert (coming.chunks, coming.bytes) == (20, disk.stats().bytes)
        tiered.flush()
        assert memory.stats().bytes == disk.stats().bytes
        assert cake.prefetch(prompt) == (0, 0, 20)
        assert cake.prefill(prompt, mode="load").report.bytes_by_tier["memory"]


def test_hints_for_another_tenant(engine: Any, prompt: Any) -> None:
    """They are about that tenant's chunks, and no other's."""
    with cake_of(engine, MemoryStore()) as cake:
        cake.prefill(prompt, tenant="ann")
        cake.wait_saved()
        assert any(run.how != "compute" for run in cake.plan(prompt, mode="load", tenant="ann"))
        assert all(run.how == "compute" for run in cake.plan(prompt, mode="load"))
        cake.pin(prompt, ttl_s=60, tenant="ann")
        assert not cake.release(prompt)
        assert not cake.release(prompt, tenant="bob")
        assert cake.release(prompt, tenant="ann")
        assert cake.learn(prompt, tenant="bob").computed_tokens == len(prompt)
        with pytest.raises(BadInput, match="tenant must be text"):
            cake.prefetch(prompt, tenant=3)  # type: ignore[arg-type]


def test_for_asyncio(engine: Any, prompt: Any) -> None:
    async def hints(cake: Cake) -> Any:
        pinned = await cake.apin(prompt, ttl_s=5)
        return pinned.chunks, await cake.arelease(prompt), await cake.aprefetch(prompt)

    with cake_of(engine, MemoryStore()) as cake:
        assert asyncio.run(hints(cake)) == (20, True, (0, 0, 0))


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), "10", True, None])
def test_times_that_are_none(engine: Any, prompt: Any, ttl_s: Any) -> None:
    with cake_of(engine, MemoryStore()) as cake, pytest.raises(BadInput, match="ttl_s"):
        cake.pin(prompt, ttl_s=ttl_s)


def test_without_a_store_or_a_whole_chunk(engine: Any, prompt: Any) -> None:
    with cake_of(engine, None) as cake:
        for hint in (lambda: cake.pin(prompt, ttl_s=1), lambda: cake.release(prompt), lambda: cake.prefetch(prompt)):
            with pytest.raises(BadInput, match="no store"):
                hint()
    with cake_of(engine, MemoryStore()) as cake:
        assert cake.pin(prompt[:5], ttl_s=1).chunks == 0
        assert not cake.release(prompt[:5])
        assert cake.prefetch(prompt[:5]) == (0, 0, 0)
        with pytest.raises(BadInput):
            cake.pin([], ttl_s=1)


def test_a_server_is_named_that_cannot_pin(engine: Any, prompt: Any) -> None:
    class Server(MemoryStore):
        """As Redis: what goes is its own business."""

        name = "server"

        def pin(self, *arguments: Any) -> None:
            raise CannotPin("its own business")

    with cake_of(engine, Server()) as cake, pytest.raises(CannotPin):
        cake.pin(prompt, ttl_s=1)
    with cake_of(engine, [MemoryStore(), Server()]) as cake:
        pinned = cake.pin(prompt, ttl_s=1)
        assert pinned.tiers == ("memory",)
        assert pinned.refused == {"server": "its own business"}


@pytest.mark.parametrize(("policy", "all_loaded"), [("lru", False), ("lookahead", True)])
def test_what_is_being_restored_is_spared(
    policy: str, all_loaded: bool, engine: Any, prompt: Any, chunk_bytes: int
) -> None:
    memory = MemoryStore(21 * chunk_bytes, policy_named(policy))  # the prompt's, and one of the others'
    numbers = count()

    def crowd(progress: Any) -> None:
        """Others write while this one loads."""
        memory.write(key_of(next(numbers)), memoryview(bytes(chunk_bytes)))

    with cake_of(engine, memory) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        memory.delete([next(iter(memory)).key])
        report = cake.prefill(prompt, mode="load", on_progress=crowd).report
        assert (report.loaded_tokens >= 19 * CHUNK) is all_loaded
        assert next(numbers) > 5
