"""What the plug-in adds to vLLM's own `/metrics`.

Both halves of the connector collect `CakeStats`, which travel with the outputs of a step; in the front-end,
`CakeMetrics` adds them to Prometheus metrics. `METRICS` is the list of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cakekv.restore.report import RestoreReport

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SHARES = tuple(tenth / 10 for tenth in range(11))


class Metric(NamedTuple):
    """One Prometheus metric."""

    kind: Literal["counter", "histogram"]
    documentation: str
    label: str | None = None
    """What it is split by, besides vLLM's own labels."""
    buckets: tuple[float, ...] = SECONDS


METRICS: dict[str, Metric] = {
    "cakekv:restores": Metric("counter", "Requests whose prompt had stored chunks and was restored.", "mode"),
    "cakekv:computed_tokens": Metric("counter", "Tokens of restored prompts that were computed."),
    "cakekv:loaded_tokens": Metric("counter", "Tokens of restored prompts that were loaded."),
    "cakekv:recomputed_tokens": Metric("counter", "Tokens computed although a chunk was stored for them."),
    "cakekv:lossy_tokens": Metric("counter", "Tokens of restored prompts that were loaded, and are not exact."),
    "cakekv:after_lossy_tokens": Metric(
        "counter", "Tokens of restored prompts that were computed behind such, and are not saved."
    ),
    "cakekv:missed_tokens": Metric("counter", "Tokens that could not be loaded, by why.", "reason"),
    "cakekv:failed_loads": Metric("counter", "Loads of a chunk that failed, by why.", "reason"),
    "cakekv:wasted_bytes": Metric("counter", "Bytes that were read in vain."),
    "cakekv:read_bytes": Metric("counter", "Bytes read from each store.", "tier"),
    "cakekv:load_seconds": Metric("histogram", "Seconds from asking for a chunk until it was in place.", "tier"),
    "cakekv:lookup_seconds": Metric("histogram", "Seconds of asking the stores what they have of a prompt."),
    "cakekv:restore_seconds": Metric("histogram", "Seconds from a request's admission until its prompt was complete."),
    "cakekv:waiting_seconds": Metric("histogram", "Seconds of a restore in which nothing of the request was computed."),
    "cakekv:meeting_point": Metric(
        "histogram", "Where compute and loads met, as a share of the stored prefix (0: all was loaded).", None, SHARES
    ),
    "cakekv:saved_chunks": Metric("counter", "Chunks that were saved."),
    "cakekv:saved_bytes": Metric("counter", "Bytes that were saved."),
    "cakekv:unsaved_chunks": Metric("counter", "Chunks that were not saved, by why.", "reason"),
    "cakekv:save_seconds": Metric("histogram", "Seconds of writing a chunk."),
}
"""All metrics by name; Prometheus shows counters with "_total" behind it."""


@dataclass
class CakeStats(KVConnectorStats):  # type: ignore[misc, unused-ignore]
    """What happened since the last step. `data` maps metrics to labels to a sum (counters) or a list (histograms).

    It is plain data, so that it passes between processes as it is.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, label: str = "") -> None:
        """Add to a counter, or an observation to a histogram.

        Parameters
        ----------
        name : str
            A key of `METRICS`.
        value : float
            How much; seconds, bytes, tokens or times.
        label : str
            The value of the metric's label, if it has one.
        """
        metric = METRICS[name]
        assert bool(label) == (metric.label is not None), f"{name} has label {metric.label}, given {label!r}"
        values = self.data.setdefault(name, {})
        if metric.kind == "counter":
            values[label] = values.get(label, 0) + value
        else:
            values.setdefault(label, []).append(value)

    def add_restore(self, report: RestoreReport) -> None:
        """Count a restore that has ended."""
        self.add("cakekv:restores", 1, report.mode)
        self.add("cakekv:computed_tokens", report.computed_tokens)
        self.add("cakekv:loaded_tokens", report.loaded_tokens)
        self.add("cakekv:recomputed_tokens", report.recomputed_tokens)
        self.add("cakekv:lossy_tokens", report.lossy_tokens)
        self.add("cakekv:after_lossy_tokens", report.after_lossy_tokens)
        self.add("cakekv:wasted_bytes", report.wasted_bytes)
        self.add("cakekv:lookup_seconds", report.lookup_s)
        self.add("cakekv:restore_seconds", report.ttft_s)
        computing_s = sum(span.ended_s - span.began_s for span in report.spans)
        self.add("cakekv:waiting_seconds", max(0.0, report.ttft_s - computing_s))
        if report.loaded_tokens and report.prefix_tokens:
            self.add("cakekv:meeting_point", (report.met_at or 0) / report.prefix_tokens)
        for reason, tokens in report.miss_reasons().items():
            self.add("cakekv:missed_tokens", tokens, kind_of(reason))
        for tier, size in report.bytes_by_tier.items():
            self.add("cakekv:read_bytes", size, tier)
        for load in report.loads:
            if load.outcome == "placed":
                self.add("cakekv:load_seconds", load.ended_s - load.began_s, load.source)
            elif load.outcome != "overtaken":
                self.add("cakekv:failed_loads", 1, kind_of(load.outcome))

    def aggregate(self, other: KVConnectorStats) -> Self:
        """Add another's figures to these."""
        for name, values in other.data.items():
            mine = self.data.setdefault(name, {})
            for label, value in values.items():
                # A list is copied, so that what is added later does not reach `other`.
                mine[label] = mine[label] + value if label in mine else value[:] if isinstance(value, list) else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """A summary for vLLM's log: counters, and means of histograms."""
        return {
            f"{name.removeprefix('cakekv:')}{f' ({label})' if label else ''}": summary
            for name, values in self.data.items()
            for label, value in values.items()
            if (summary := round(sum(value) / len(value), 4) if isinstance(value, list) else value)
        }

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class CakeMetrics(KVConnectorPromMetrics):  # type: ignore[misc, unused-ignore]
    """The Prometheus metrics, one set per engine. Those without a label of their own are there from the start."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = dict(self._make(metric_types, labelnames))
        for name, metric in METRICS.items():
            for engine in per_engine_labelvalues:
                if metric.label is None:
                    self._child(name, "", engine)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the data of a `CakeStats`."""
        for name, values in transfer_stats_data.items():
            for label, value in values.items():
                child = self._child(name, label, engine_idx)
                if METRICS[name].kind == "counter":
                    child.inc(value)
                else:
                    for observation in value:
                        child.observe(observation)

    def _child(self, name: str, label: str, engine: int) -> Any:
        return self._metrics[name].labels(*self.per_engine_labelvalues[engine], *([label] if label else []))

    @staticmethod
    def _make(metric_types: dict[Any, Any], labelnames: list[str]) -> Iterator[tuple[str, Any]]:
        for name, metric in METRICS.items():
            labels = [*labelnames, *([metric.label] if metric.label else [])]
            if metric.kind == "counter":
                yield name, metric_types[Counter](name=name, documentation=metric.documentation, labelnames=labels)
            else:
                yield (
                    name,
                    metric_types[Histogram](
                        name=name, documentation=metric.documentation, labelnames=labels, buckets=metric.buckets
                    ),
                )


def kind_of(reason: str) -> str:
    """A reason without its particulars, as a label: "corrupt: a segment ..." becomes "corrupt"."""
    return reason.partition(":")[0].strip()[:60]
