"""Metrics of tiers, restores and saves, as a Prometheus server would get them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from cakekv.errors import MissingChunk, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.metrics import Metrics
from cakekv.restore.report import LoadRecord, Miss, RestoreReport, SpanRecord
from cakekv.store.base import StoreStats
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store

from .chunks import SIZE, chunk_of, key_of, packable_chunk_of, part_of, read
from .servers import free_port, valkey


class Scraped:
    """Metrics, and a server that shows them."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.metrics = Metrics(registry)
        self._server, self._thread = start_http_server(0, "127.0.0.1", registry)

    def __call__(self, name: str, **labels: str) -> Any:
        """The value of a sample now; None if there is none."""
        with urlopen(f"http://127.0.0.1:{self._server.server_port}/metrics") as answer:
            text = answer.read().decode()
        found = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"cakekv:{name}" and sample.labels == labels
        ]
        assert len(found) <= 1
        return found[0] if found else None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def scraped() -> Iterator[Scraped]:
    made = Scraped()
    yield made
    made.close()


def test_what_a_tier_does_is_counted(scraped: Scraped, tmp_path: Path) -> None:
    with open_store(f"{tmp_path}/kv?capacity={3 * SIZE}", scraped.metrics) as store:
        assert scraped("tier_operations_total", tier="disk", operation="read") == 0
        for number in range(5):
            store.write(key_of(number), chunk_of(number))
        store.lookup([key_of(number) for number in range(5)])
        assert read(store, key_of(4)) == chunk_of(4)
        with store.open(key_of(3)) as reader:
            reader.read_into(memoryview(bytearray(100)), 0)
        with pytest.raises(MissingChunk):
            store.open(key_of(0))
        expected = {
            ("operations_total", "lookup"): 1,
            ("operations_total", "read"): 3,
            ("operations_total", "write"): 5,
            ("seconds_count", "lookup"): 1,
            ("seconds_count", "read"): 2,
            ("seconds_count", "write"): 5,
            ("bytes_total", "read"): SIZE + 100,
            ("bytes_total", "write"): 5 * SIZE,
        }
        for (name, operation), value in expected.items():
            assert scraped(f"tier_{name}", tier="disk", operation=operation) == value, (name, operation)
        assert scraped("tier_seconds_sum", tier="disk", operation="read") > 0
        assert scraped("tier_seconds_bucket", tier="disk", operation="lookup", le="+Inf") == 1
        assert scraped("tier_failures_total", tier="disk", operation="read", reason="missing") == 1
        assert scraped("tier_evicted_chunks_total", tier="disk") == 2
        assert scraped("tier_evicted_bytes_total", tier="disk") == 2 * SIZE
        assert scraped("tier_held_bytes", tier="disk") == 3 * SIZE
        assert scraped("tier_held_chunks", tier="disk") == 3
        assert scraped("tier_capacity_bytes", tier="disk") == 3 * SIZE
        assert scraped("tier_up", tier="disk") is None, "only tiers of a tiered store come and go"
    assert scraped("tier_held_bytes", tier="disk") is None, "it is closed"
    assert scraped("tier_evicted_chunks_total", tier="disk") == 2


@pytest.mark.parametrize(
    ("faults", "operation", "reason"),
    [
        ("write.error:1", "write", "failed"),
        ("lookup.error:1", "lookup", "failed"),
        ("open.error:1", "read", "failed"),
        ("read.error:1", "read", "failed"),
        ("read.vanish:1", "read", "missing"),
    ],
)
def test_failures_are_counted_by_reason(scraped: Scraped, faults: str, operation: str, reason: str) -> None:
    store = open_store(f"memory://?faults=seed:1,{faults}", scraped.metrics)
    part_of(store, MemoryStore).write(key_of(0), chunk_of(0))
    with pytest.raises(StoreError):
        {
            "write": lambda: store.write(key_of(1), chunk_of(1)),
            "lookup": lambda: store.lookup([key_of(0)]),
            "read": lambda: read(store, key_of(0)),
        }[operation]()
    assert scraped("tier_failures_total", tier="memory", operation=operation, reason=reason) == 1
    assert scraped("tier_seconds_count", tier="memory", operation=operation) == 0


def test_a_full_tier_is_told_from_a_failing_one(scraped: Scraped) -> None:
    class Full(MemoryStore):
        def write(self, key: ChunkKey, data: memoryview) -> bool:
            raise StoreFull("no room")

    with pytest.raises(StoreFull):
        scraped.metrics.meter(Full()).write(key_of(0), chunk_of(0))
    assert scraped("tier_failures_total", tier="memory", operation="write", reason="full") == 1


def test_declined_chunks_are_no_bytes(scraped: Scraped) -> None:
    store = open_store("memory://?capacity=1kB", scraped.metrics)
    assert not store.write(key_of(0), chunk_of(0))
    assert scraped("tier_operations_total", tier="memory", operation="write") == 1
    assert scraped("tier_bytes_total", tier="memory", operation="write") == 0


def test_tiers_of_a_tiered_store_come_and_go(scraped: Scraped, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://?capacity=1MB"
        [[tier]]
        url = "redis://127.0.0.1:{port}?timeout=1s"
        deadline = "500ms"
    """)
    (tmp_path / "data").mkdir()
    with open_store(f"tiered://{tmp_path}/kv.toml", scraped.metrics) as store:
        assert scraped("tier_up", tier="memory") == 1
        assert scraped("tier_retry_seconds", tier="memory") == 0
        assert scraped("tier_up", tier="redis") == 0
        assert scraped("tier_retry_seconds", tier="redis") >= 1
        store.write(key_of(0), chunk_of(0))
        assert scraped("tier_operations_total", tier="memory", operation="write") == 1
        with valkey(tmp_path / "data", port=port):
            deadline = time.monotonic() + 60
            while scraped("tier_up", tier="redis") == 0:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert scraped("tier_retry_seconds", tier="redis") == 0
            store.write(key_of(1), chunk_of(1))
            assert scraped("tier_bytes_total", tier="redis", operation="write") == SIZE
            assert scraped("tier_held_bytes", tier="redis") is None, "to count that would take a scan"
            assert scraped("tier_held_bytes", tier="memory") == 2 * SIZE


def test_a_store_that_was_closed_says_nothing_about_those_that_are_open(scraped: Scraped, tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text('[[tier]]\nurl = "memory://"\n')
    first, second = (open_store(f"tiered://{tmp_path}/kv.toml", scraped.metrics) for _ in range(2))
    first.close()
    assert scraped("tier_up", tier="memory") == 1
    second.close()
    assert scraped("tier_up", tier="memory") is None


def test_copies_that_are_lost_are_counted(scraped: Scraped, tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://"
        [[tier]]
        url = "redis://127.0.0.1:{free_port()}"
        write = "back"
    """)
    with open_store(f"tiered://{tmp_path}/kv.toml", scraped.metrics) as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
    assert scraped("tier_uncopied_chunks_total", tier="redis") == 3


def test_a_tier_that_does_not_count_in_time_is_left_out(scraped: Scraped) -> None:
    import threading

    well = threading.Event()

    class Slow(MemoryStore):
        def stats(self) -> StoreStats:
            well.wait(60)
            return super().stats()

    store = scraped.metrics.meter(Slow())
    assert scraped("tier_held_bytes", tier="memory") is None
    well.set()
    while scraped("tier_held_bytes", tier="memory") is None:
        time.sleep(0.01)
    store.close()


def test_restores_and_saves_are_counted(scraped: Scraped) -> None:
    report = RestoreReport("auto", 1100, 100, prefix_tokens=1000, ttft_s=2.0, lookup_s=0.01)
    report.computed_tokens, report.loaded_tokens, report.recomputed_tokens = 500, 600, 100
    report.met_at = 400
    report.bytes_by_tier = {"disk": 6000}
    report.spans = [SpanRecord(0, 400, 0.0, 1.0)]
    report.loads = [
        LoadRecord(900, 100, "disk", 0.0, 0.5, 1000, "placed"),
        LoadRecord(800, 100, "disk", 0.5, 0.6, 500, "corrupt: segment checksum"),
    ]
    report.misses = [Miss(800, 100, "corrupt: segment checksum")]
    for _ in range(2):
        scraped.metrics.add_restore(report)
    scraped.metrics.add_save("saved", 100, 0.5)
    scraped.metrics.add_save("declined", 100, 0.5)
    assert scraped("restores_total", mode="auto") == 2
    assert scraped("computed_tokens_total") == 1000
    assert scraped("loaded_tokens_total") == 1200
    assert scraped("recomputed_tokens_total") == 200
    assert scraped("missed_tokens_total", reason="corrupt") == 200
    assert scraped("failed_loads_total", reason="corrupt") == 2
    assert scraped("restore_seconds_sum") == 4.0
    assert scraped("load_seconds_count", tier="disk") == 2
    assert scraped("saved_chunks_total") == 1
    assert scraped("saved_bytes_total") == 100
    assert scraped("save_seconds_sum") == 0.5
    assert scraped("unsaved_chunks_total", reason="declined") == 1


def test_what_packing_saves_is_counted(scraped: Scraped) -> None:
    raw = packable_chunk_of(0)
    with open_store("memory://?pack=yes", scraped.metrics) as store:
        store.write(key_of(0), raw)
        store.write(key_of(1), chunk_of(1))
        [size] = store.lookup([key_of(0)])
    assert size is not None
    assert scraped("tier_packing_saved_bytes_total", tier="memory") == len(raw) - size
    assert scraped("tier_bytes_total", tier="memory", operation="write") == size + SIZE
