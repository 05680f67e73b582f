"""The virtual clock, on cases worked out by hand."""

from __future__ import annotations

import pytest

from cakekv.restore.flights import Load
from cakekv.restore.planner import Span, Wait
from cakekv.simulate.baseline import CakeBaseline
from cakekv.simulate.machine import VirtualTier, constant, run_restore
from cakekv.simulate.rate import Rate


class Scripted:
    """Loads chunks of the given sizes, `depth` at a time, computes the given spans, and notes when things ended."""

    def __init__(self, sizes: list[int], depth: int = 1, spans: int = 0) -> None:
        self.waiting = [Load(chunk, chunk, 1, 0, True, size, 0.0) for chunk, size in enumerate(sizes)]
        self.depth = depth
        self.flying: list[Load] = []
        self.spans = [Span(start, 1) for start in range(spans)]
        self.ended: dict[int, float] = {}
        self.computed_at: list[float] = []
        self.abandoned_bytes: list[int] = []
        self.cancel_with_span = False

    def next_compute(self, now: float) -> Span | Wait | None:
        if self.spans:
            return self.spans.pop(0)
        return Wait(now + 1e6) if self.flying or self.waiting else None

    def layer_ready(self, group: int) -> bool:
        return True

    def computed(self, span: Span, now: float, waited_s: float = 0.0) -> None:
        self.computed_at.append(now)
        if self.cancel_with_span:
            for load in self.flying:
                load.cancelled = True

    def next_load(self, tier: int, now: float) -> Load | None:
        if not self.waiting or len(self.flying) >= self.depth:
            return None
        load = self.waiting.pop(0)
        self.flying.append(load)
        return load

    def arrived(self, load: Load, now: float) -> bool:
        self.flying.remove(load)
        return True

    def placed(self, load: Load, now: float) -> None:
        self.ended[load.chunk] = now

    def abandoned(self, load: Load, size: int, now: float) -> None:
        self.flying.remove(load)
        self.abandoned_bytes.append(size)


def no_time(span: Span, now: float) -> float:
    return 0.0


def test_loads_in_flight_share_the_bandwidth_evenly() -> None:
    # 100 B/s. Both at 50 B/s: the first 100 bytes take 2 s. Then 200 more at 100 B/s: 2 s more.
    script = Scripted([100, 300], depth=2)
    assert run_restore(script, no_time, [VirtualTier(constant(100.0))]) == pytest.approx(4.0)
    assert script.ended == pytest.approx({0: 2.0, 1: 4.0})


def test_latency_passes_before_the_first_byte_and_takes_no_bandwidth() -> None:
    # One at a time: 0.5 + 1 s, then 0.5 + 2 s.
    alone = Scripted([100, 200])
    run_restore(alone, no_time, [VirtualTier(constant(100.0), latency_s=0.5)])
    assert alone.ended == pytest.approx({0: 1.5, 1: 4.0})
    # Two at a time: latencies overlap; at 0.5 s both flow at 50 B/s.
    paired = Scripted([100, 200], depth=2)
    run_restore(paired, no_time, [VirtualTier(constant(100.0), latency_s=0.5)])
    assert paired.ended == pytest.approx({0: 2.5, 1: 3.5})


def test_a_bandwidth_that_changes_while_a_load_flows() -> None:
    # 100 B/s for 1 s, nothing for 1 s, 50 B/s from then on: 100 bytes by 1 s, the other 100 by 4 s.
    script = Scripted([200])
    assert run_restore(script, no_time, [VirtualTier(Rate([100.0, 0.0, 50.0]))]) == pytest.approx(4.0)


def test_a_cancelled_load_is_abandoned_after_the_bytes_that_had_come() -> None:
    # The span ends at 1.5 s; 150 of 1000 bytes are there.
    script = Scripted([1000], spans=1)
    script.cancel_with_span = True
    run_restore(script, lambda span, now: 1.5, [VirtualTier(constant(100.0))])
    assert script.abandoned_bytes == [150]
    assert script.ended == {}


def test_the_paper_cake_meets_where_arithmetic_says() -> None:
    # 8 tokens of 10 bytes; steps of 2 take 3 s; chunks of 1 come every 2 s (5 B/s).
    # Loaded from the back: 7 at 2 s, 6 at 4 s, 5 at 6 s, 4 at 8 s. Computed: 2 at 3 s, 4 at 6 s.
    # At 6 s the front is at 4, the back at 5: one more step (4, 5) is begun and ends at 9 s, when 4 has come, too.
    cake = CakeBaseline(tokens=8, token_bytes=10, step_tokens=2, chunk_tokens=1)
    assert run_restore(cake, lambda span, now: 3.0, [VirtualTier(constant(5.0))]) == pytest.approx(9.0)
    assert (cake.front, cake.back) == (6, 4)


def test_the_paper_cake_gives_up_a_chunk_that_compute_has_reached() -> None:
    # Chunk 1 would come after 1000 s; the two steps end at 2 s.
    cake = CakeBaseline(tokens=4, token_bytes=500, step_tokens=2, chunk_tokens=2)
    assert run_restore(cake, lambda span, now: 1.0, [VirtualTier(constant(1.0))]) == pytest.approx(2.0)
    assert (cake.front, cake.back) == (4, 4)
