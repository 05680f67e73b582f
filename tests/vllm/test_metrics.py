"""Stats travel as plain data, add up, and end in Prometheus metrics; the dashboard asks for those that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.config import VllmConfig

from cakekv.restore.report import LoadRecord, Miss, RestoreReport, SpanRecord
from cakekv.vllm.metrics import METRICS, CakeMetrics, CakeStats, kind_of

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
LABELS = ("model_name", "engine")


def a_report() -> RestoreReport:
    report = RestoreReport("auto", 1100, 100, prefix_tokens=1000, ttft_s=2.0, lookup_s=0.01)
    report.computed_tokens, report.loaded_tokens, report.recomputed_tokens = 500, 600, 100
    report.wasted_bytes, report.met_at = 70, 400
    report.bytes_by_tier = {"disk": 6000, "redis": 10}
    report.spans = [SpanRecord(0, 400, 0.0, 1.0), SpanRecord(1000, 100, 1.75, 2.0)]
    report.loads = [
        LoadRecord(900, 100, "disk", 0.0, 0.5, 1000, "placed"),
        LoadRecord(800, 100, "disk", 0.5, 0.6, 500, "corrupt: segment checksum"),
        LoadRecord(400, 100, "disk", 0.6, 0.7, 70, "overtaken"),
    ]
    report.misses = [Miss(800, 100, "corrupt: segment checksum")]
    return report


def prometheus(*stats: CakeStats) -> str:
    """What `/metrics` shows after these stats."""
    registry = CollectorRegistry()

    def registered(kind: Any) -> Any:
        return lambda **arguments: kind(**arguments, registry=registry)

    types = {kind: registered(kind) for kind in (Counter, Gauge, Histogram)}
    metrics = CakeMetrics(VllmConfig(), types, list(LABELS), {0: ["m", "0"]})
    for stat in stats:
        metrics.observe(stat.to_dict())
    return generate_latest(registry).decode()


def value(text: str, sample: str) -> float:
    """The value of a sample, given by its name and its labels besides vLLM's."""
    found = {
        found.name
        + "".join(f'{{{name}="{label}"}}' for name, label in found.labels.items() if name not in LABELS): found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if "le" not in found.labels
    }
    return found[sample]


def test_a_restore_in_prometheus() -> None:
    stats = CakeStats()
    stats.add_restore(a_report())
    text = prometheus(stats)
    for sample, expected in {
        'cakekv:restores_total{mode="auto"}': 1,
        "cakekv:computed_tokens_total": 500,
        "cakekv:loaded_tokens_total": 600,
        "cakekv:recomputed_tokens_total": 100,
        "cakekv:wasted_bytes_total": 70,
        'cakekv:read_bytes_total{tier="disk"}': 6000,
        'cakekv:read_bytes_total{tier="redis"}': 10,
        'cakekv:missed_tokens_total{reason="corrupt"}': 100,
        'cakekv:failed_loads_total{reason="corrupt"}': 1,
        'cakekv:load_seconds_sum{tier="disk"}': 0.5,
        'cakekv:load_seconds_count{tier="disk"}': 1,
        "cakekv:restore_seconds_sum": 2.0,
        "cakekv:waiting_seconds_sum": 0.75,
        "cakekv:meeting_point_sum": 0.4,
        "cakekv:lookup_seconds_count": 1,
    }.items():
        assert value(text, sample) == pytest.approx(expected), sample


def test_all_metrics_without_labels_are_shown_before_anything_happened() -> None:
    text = prometheus()
    for name, metric in METRICS.items():
        if metric.label is None:
            assert value(text, f"{name}_{'total' if metric.kind == 'counter' else 'count'}") == 0


def test_stats_survive_the_way_between_processes_and_add_up() -> None:
    worker, scheduler = CakeStats(), CakeStats()
    worker.add("cakekv:saved_chunks", 2)
    worker.add("cakekv:save_seconds", 0.25)
    scheduler.add("cakekv:saved_chunks", 3)
    scheduler.add("cakekv:save_seconds", 0.5)
    scheduler.add_restore(a_report())
    sent = CakeStats(msgspec.msgpack.decode(msgspec.msgpack.encode(worker.to_dict())))
    together = sent.aggregate(scheduler)
    text = prometheus(together)
    assert value(text, "cakekv:saved_chunks_total") == 5
    assert value(text, "cakekv:save_seconds_count") == 2
    assert value(text, "cakekv:loaded_tokens_total") == 600
    together.add("cakekv:load_seconds", 9.0, "disk")
    assert scheduler.data["cakekv:load_seconds"] == {"disk": [0.5]}


def test_a_summary_for_the_log() -> None:
    stats = CakeStats()
    assert stats.is_empty()
    stats.add_restore(a_report())
    assert not stats.is_empty()
    summary = stats.reduce()
    assert summary["loaded_tokens"] == 600
    assert summary["load_seconds (disk)"] == 0.5
    stats.reset()
    assert stats.is_empty()


def test_a_label_that_is_missing_or_too_much_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="has label tier"):
        CakeStats().add("cakekv:read_bytes", 1)
    with pytest.raises(AssertionError, match="has label None"):
        CakeStats().add("cakekv:saved_chunks", 1, "disk")


def test_reasons_as_labels() -> None:
    assert kind_of("corrupt: segment checksum") == "corrupt"
    assert kind_of("late") == "late"
    assert kind_of("store failed: [Errno 5] /a/b: c") == "store failed"


def test_every_panel_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    samples = set(re.findall(r"^(?:# TYPE )?((?:cakekv|vllm):\w+)", prometheus(), re.MULTILINE))
    for name, metric in METRICS.items():
        ends = ("_total",) if metric.kind == "counter" else ("_bucket", "_sum", "_count")
        samples |= {f"{name}{end}" for end in ends}
    samples |= {f"vllm:time_to_first_token_seconds_{end}" for end in ("bucket", "sum", "count")}
    asked = set()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert queries
    for query in queries:
        names = set(re.findall(r"(?:cakekv|vllm):\w+", query))
        assert names, f"{query} names no metric"
        assert names <= samples, f"{query} names {names - samples}"
        asked |= names
    for name in METRICS:
        assert any(sample.startswith(name) for sample in asked), f"no panel shows {name}"
    for panel in dashboard["panels"]:
        for label in re.findall(r"by \(([\w, ]+)\)", " ".join(t["expr"] for t in panel.get("targets", ()))):
            known = {metric.label for metric in METRICS.values()} | {"le", "model_name", "engine"}
            assert set(re.split(r", ?", label)) <= known


def test_the_documentation_lists_all_metrics() -> None:
    table = (DASHBOARD.parent / "vllm.md").read_text()
    for name, metric in METRICS.items():
        shown = f"{name}_total" if metric.kind == "counter" else name
        assert f"| `{shown}` | {metric.label or ''} | {metric.documentation} |" in table
