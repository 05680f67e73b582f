"""A tiered store behind a `Cake`: every tier is loaded from, and new chunks go where the store puts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.tiered import TieredStore, TierPlan, Writing
from tests.store.chunks import opener

CHUNK = 16


@pytest.fixture
def stores() -> Any:
    return MemoryStore(), MemoryStore()


@pytest.fixture
def tiered(stores: Any) -> Iterator[Any]:
    members = [Member(opener(store), "memory") for store in stores]
    with TieredStore([TierPlan(members[0]), TierPlan(members[1], Writing.BACK)]) as store:
        yield store


def test_all_tiers_are_loaded_from_and_written_to(engine: Any, prompt: Any, stores: Any, tiered: Any) -> None:
    with Cake(engine, store=tiered, chunk_tokens=CHUNK, max_span_tokens=CHUNK) as cake:
        exact = cake.prefill(prompt).logits
        cake.wait_saved()
        tiered.flush()
        assert [store.stats().chunks for store in stores] == [20, 20]
        assert [len(store.identities()) for store in stores] == [1, 1]
        stored = sorted(chunk.key for chunk in stores[0])
        stores[0].delete(stored[:10])
        stores[1].delete(stored[10:])
        restored = cake.prefill(prompt, mode="load")
        assert restored.report.loaded_tokens == 20 * CHUNK
        assert {load.source for load in restored.report.loads} == {"memory", "memory-2"}
        assert torch.allclose(restored.logits, exact, atol=1e-4)
        tiered.flush()
        assert stores[0].stats().chunks == 20, "what was loaded from behind is in front now"


def test_stores_opened_for_a_cake_are_closed_with_it(engine: Any, prompt: Any, tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://"
        [[tier]]
        url = "{tmp_path}/disk"
        write = "back"
    """)
    for loaded in (0, 20 * CHUNK):
        with Cake(engine, store=f"tiered://{tmp_path}/kv.toml", chunk_tokens=CHUNK, max_span_tokens=CHUNK) as cake:
            assert cake.prefill(prompt, mode="load").report.loaded_tokens == loaded
    with Cake(engine, store=["memory://", f"{tmp_path}/disk"], chunk_tokens=CHUNK, max_span_tokens=CHUNK) as cake:
        assert cake.prefill(prompt, mode="load").report.loaded_tokens == 20 * CHUNK
