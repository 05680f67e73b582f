"""The suffix computed while the last chunks before it arrive, layer by layer."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.chunk import ChunkShape, segments
from cakekv.embedded.loader import Loader
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.load import pieces
from cakekv.load.pieces import layer_groups
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import LayerGroups, Level
from cakekv.restore.planner import Planner, PlannerOptions
from cakekv.simulate.machine import VirtualTier, constant, run_restore
from cakekv.store.base import ChunkReader
from cakekv.store.memory import MemoryStore

CHUNK = 16
PREFIX = 20 * CHUNK


def poison(cache: TwoEndedCache) -> TwoEndedCache:
    for layer in cache.stored:
        for region in layer.regions:
            region.fill_(float("nan"))
    return cache


def test_a_layer_needs_its_own_part_of_the_prefix_only(engine: TransformersEngine, prompt: list[int]) -> None:
    """Each layer's keys and values are put into a poisoned cache only when the suffix asks for that layer."""
    full = engine.new_cache(len(prompt))
    expected = engine.compute(full, prompt, 0)
    shape = ChunkShape(PREFIX, engine.layout.segment_bytes(PREFIX))
    views = segments(shape, engine.staging(shape.total_bytes))
    engine.gather(full, 0, PREFIX, views)
    cache = poison(engine.new_cache(len(prompt)))
    asked = []

    def gate(layer: int) -> None:
        asked.append(layer)
        engine.place(cache, 0, PREFIX, [view if index == layer else None for index, view in enumerate(views)])

    logits = engine.compute(cache, prompt[PREFIX:], PREFIX, gate)
    assert asked == [0, 1, 2]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert engine.compute(poison(cache), prompt[PREFIX:], PREFIX).isnan().all(), "the gate is gone after the span"


def test_groups_cover_all_layers_in_order() -> None:
    shape = ChunkShape(64, (200_000,) * 30)
    groups = layer_groups(shape)
    assert [layer for group in groups for layer in group] == list(range(30))
    assert len(groups) == 16
    assert layer_groups(ChunkShape(1, (10, 10))) == [range(2)]


@pytest.mark.parametrize("suffix", [1000, 300])
def test_on_a_virtual_clock_both_arms_stay_busy_to_the_end(suffix: int) -> None:
    """Compute takes 1 ms a token and a load 1 ms a token: p positions before the suffix, of which m are computed."""
    prefix = 3008

    def ttft(groups: int) -> tuple[float, Planner]:
        load, compute = LoadCost(2), ComputeCost(ComputeShape(1e-4, 1e-3, 1e-9), trusted=True)
        load.observe(64_000, -1.0, -0.936)
        cut = LayerGroups((64_000 // groups,) * groups, (64_000 // groups,) * groups) if groups > 1 else None
        restore = Planner(
            prefix + suffix, 64, [(0,)] * 47, [Tier("disk", load, 2)], compute, [Level.whole(64_000, cut)]
        )
        tier = VirtualTier(constant(1e6))
        return run_restore(restore, lambda span, now: 1e-4 + span.tokens * 1e-3, [tier], groups=groups), restore

    plain, _ = ttft(1)
    layered, restore = ttft(10)
    # Plain: half of the prefix each, then the suffix. Layered: the loads have the suffix's time, too.
    assert plain == pytest.approx(prefix / 2000 + suffix / 1000, rel=0.05)
    assert layered == pytest.approx((prefix + suffix) / 2000, rel=0.1)
    assert layered < plain
    pieces = [load for load in restore.report().loads if load.group is not None]
    assert pieces
    assert restore.report().computed_tokens + restore.report().loaded_tokens == prefix + suffix


def test_only_what_can_be_in_the_suffixs_way_is_cut_into_pieces() -> None:
    """A chunk takes 10 ms to load, the suffix 60 ms to compute: 4 of 5 groups wait, and half as much again is cut."""
    load, compute = LoadCost(1), ComputeCost(ComputeShape(1e-4, 2e-3, 1e-9), trusted=True)
    load.observe(64_000, -1.0, -0.99)
    groups = LayerGroups((12_800,) * 5, (12_800,) * 5)
    restore = Planner(
        40 * 64 + 30,
        64,
        [(0,)] * 40,
        [Tier("disk", load, 1)],
        compute,
        [Level.whole(64_000, groups)],
        PlannerOptions(mode="both", max_span_tokens=64),
    )
    tier = VirtualTier(constant(6.4e6))
    seconds = run_restore(restore, lambda span, now: 1e-4 + span.tokens * 2e-3, [tier], groups=5)
    loads = [load for load in restore.report().loads if load.outcome == "placed"]
    cut = {load.start // 64 for load in loads if load.group is not None}
    assert 6 <= len(cut) <= 10, "1.5 * 0.8 * 60 ms, of 10 ms each"
    assert cut == {*range(min(cut), max(cut) + 1)}, "the last ones to come"
    whole = [load for load in loads if load.group is None]
    assert len(whole) > len(cut)
    assert max(load.ended_s for load in whole) <= min(load.began_s for load in loads if load.group is not None) + 1e-9
    assert seconds < max(load.ended_s for load in loads) + 0.03


class Paced(TransformersEngine):
    """Computes no faster than 2 ms a token, so that slow loads are worth something."""

    def compute(self, cache: Any, token_ids: Any, start: int, gate: Any = None) -> torch.Tensor:
        time.sleep(0.002 * len(token_ids))
        return super().compute(cache, token_ids, start, gate)

    def new_cache(self, capacity: int) -> TwoEndedCache:
        return poison(super().new_cache(capacity))


class Slow(MemoryStore):
    """20 ms before a chunk is open; `fails_in_pieces` breaks every read of a piece."""

    fails_in_pieces = False
    piece = threading.local()

    def open(self, key: ChunkKey) -> ChunkReader:
        time.sleep(0.02)
        if self.fails_in_pieces and getattr(self.piece, "now", False):
            raise StoreError("torn off")
        return super().open(key)


@pytest.mark.parametrize("fails", [False, True])
def test_the_answer_is_the_same_whether_pieces_arrive_or_fail(
    engine: TransformersEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(pieces, "_LEAST_READ_BYTES", 1)
    long = prompt[:PREFIX] + [3, 1, 4, 1, 5, 9, 2, 6] * 25
    expected = Cake(engine, chunk_tokens=CHUNK).generate(long, max_new_tokens=8)
    store = Slow()
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(long[:PREFIX])
    original = Loader._perform

    def perform(self: Any, loading: Any, load: Any) -> None:
        store.piece.now = load.group is not None
        original(self, loading, load)

    monkeypatch.setattr(Loader, "_perform", perform)
    cake = Cake(Paced(engine.model), store=store, chunk_tokens=CHUNK, max_span_tokens=64)
    cake.prefill(long, mode="both", save=False)  # learns what both arms cost
    store.fails_in_pieces = fails
    for _ in range(3):
        answer = cake.generate(long, max_new_tokens=8, mode="both", save=False)
        assert answer.token_ids == expected.token_ids
        assert answer.report.computed_tokens + answer.report.loaded_tokens == len(long)
        if fails:
            assert all(load.group is None for load in answer.report.loads if load.outcome == "placed")
