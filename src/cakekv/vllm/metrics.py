"""What the plug-in adds to vLLM's own `/metrics`.

Both halves of the connector collect `CakeStats`, which travel with the outputs of a step; in the front-end,
`CakeMetrics` adds them to Prometheus metrics. `METRICS` (`cakekv.report.metrics`) is the list of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cakekv.report.metrics import METRICS, figures, kind_of
from cakekv.restore.report import RestoreReport

__all__ = ["METRICS", "CakeMetrics", "CakeStats", "kind_of"]


_OF_COMPLETE_ONES = {"cakekv:restore_seconds", "cakekv:waiting_seconds", "cakekv:meeting_point"}


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

    def add_restore(self, report: RestoreReport, complete: bool = True) -> None:
        """Count a restore that has ended. One that was broken off has no times that could be compared."""
        for figure in figures(report):
            if complete or figure.name not in _OF_COMPLETE_ONES:
                self.add(*figure)

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
