"""What a `Cake` logs and counts of what it does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.metrics import Metrics
from cakekv.store.memory import MemoryStore

CHUNK = 16


class Damaging(MemoryStore):
    """Keeps every chunk with one wrong bit."""

    def write(self, key: Any, data: memoryview) -> bool:
        data = memoryview(bytearray(data))
        data[5000] ^= 1
        return super().write(key, data)


def test_a_restore_in_one_line(engine: TransformersEngine, prompt: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cakekv")
    with Cake(engine, store=Damaging(), chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        report = cake.prefill(prompt, mode="load").report
    first, second = (record.fields for record in caplog.records if record.event == "restore_finished")  # type: ignore[attr-defined]
    assert (first["computed_tokens"], first["prefix_tokens"]) == (len(prompt), 0)
    assert second["mode"] == "load"
    assert second["prompt_tokens"] == second["computed_tokens"] == len(prompt)
    assert second["recomputed_tokens"] == second["prefix_tokens"] == 20 * CHUNK
    assert second["missed_tokens"]["corrupt"] == 20 * CHUNK
    assert second["bytes_by_tier"] == report.bytes_by_tier
    assert second["ttft_s"] == pytest.approx(report.ttft_s, abs=1e-3)
    corrupt = [record.fields for record in caplog.records if record.event == "chunk_corrupt"]  # type: ignore[attr-defined]
    assert len(corrupt) == 20
    assert (corrupt[0]["tier"], corrupt[0]["fault"]) == ("memory", "segment_checksum")
    assert str(prompt[:3])[1:-1] not in caplog.text, "no prompt in the log"


def test_a_restore_in_metrics(engine: TransformersEngine, prompt: list[int], tmp_path: Any) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"cakekv:{name}", labels)

    with Cake(engine, store=f"{tmp_path}/kv", chunk_tokens=CHUNK, metrics=metrics) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        cake.prefill(prompt, mode="load")
        assert value("saved_chunks_total") == 20
        assert value("restores_total", mode="load") == 1
        assert value("loaded_tokens_total") == 20 * CHUNK
        assert value("tier_operations_total", tier="disk", operation="write") == 20
        assert value("tier_operations_total", tier="disk", operation="read") == 20
        assert value("tier_operations_total", tier="disk", operation="lookup") == 2
        assert value("tier_held_chunks", tier="disk") == 20
        assert value("read_bytes_total", tier="disk") == value("tier_bytes_total", tier="disk", operation="read")
