"""What a `Cake` logs and counts of what it does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import StoreError
from cakekv.metrics import Metrics
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.sizes import known_sizes
from cakekv.store.tiered import TieredStore, TierPlan, Writing
from tests.store.moody import Moody, eventually

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
        assert value("tier_operations_total", tier="disk", operation="lookup") == 4, "for chunks, and for tails"
        assert value("tier_held_chunks", tier="disk") == 20
        assert value("read_bytes_total", tier="disk") == value("tier_bytes_total", tier="disk", operation="read")


def events(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    found = [record.event for record in caplog.records if hasattr(record, "event") and record.levelno >= level]
    return [event for event in found if event not in ("restore_finished", "evicted")]


@pytest.mark.parametrize("tiered", [False, True])
def test_a_tier_that_is_away_is_said_once_and_that_it_is_back(
    engine: TransformersEngine, prompt: list[int], caplog: pytest.LogCaptureFixture, tiered: bool
) -> None:
    caplog.set_level(logging.DEBUG, logger="cakekv")
    moody = Moody()
    member = Member(lambda: moody, "moody", first_retry_s=0.05)
    store = TieredStore([TierPlan(member), TierPlan(Member(MemoryStore, "memory"))]) if tiered else moody
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        caplog.clear()
        moody.well.clear()
        for _ in range(5):
            cake.prefill(prompt, save=False)
        assert events(caplog, logging.WARNING) == ["tier_down" if tiered else "tier_failed"]
        moody.well.set()
        eventually(lambda: member.is_up)
        cake.prefill(prompt, save=False)
        assert ("tier_up" if tiered else "tier_answers") in events(caplog)


def test_what_a_look_up_could_not_tell_is_noted_and_logged_once(
    engine: TransformersEngine, prompt: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cakekv")

    class Unsure(MemoryStore):
        def lookup(self, keys: Any) -> Any:
            known = dict(zip(keys, super().lookup(keys), strict=True))
            failed = {key: StoreError("who knows") for key in keys[:2]}
            return known_sizes(keys, {key: size for key, size in known.items() if key not in failed}, failed)

    with Cake(engine, store=Unsure(), chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        for _ in range(3):
            report = cake.prefill(prompt, mode="load", save=False).report
        assert report.loaded_tokens == 18 * CHUNK
        assert "2 of 20 chunks could not be looked up, and count as not stored: who knows" in report.notes[0]
    assert events(caplog).count("lookup_incomplete") == 1


def test_saved_chunks_that_wait_for_their_copy_are_in_the_report(engine: TransformersEngine, prompt: list[int]) -> None:
    back = Moody()
    member = Member(lambda: back, "back", first_retry_s=100)
    plan = [TierPlan(Member(MemoryStore, "memory")), TierPlan(member, Writing.BACK)]
    store = TieredStore(plan)
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        back.well.clear()
        cake.prefill(prompt)
        report = cake.wait_saved()
        assert (report.saved_chunks, report.failed_chunks) == (20, 0)
        assert (report.waiting_copies, report.uncopied_chunks) == (20, 0)
        store.close()
        assert cake.wait_saved().uncopied_chunks == 20
