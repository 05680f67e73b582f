"""Prometheus metrics of tiers, restores and saves. Needs `pip install 'cakekv[metrics]'`.

from prometheus_client import start_http_server
from cakekv.metrics import Metrics

cake = Cake(engine, tokenizer, "tiered:///etc/kv.toml", metrics=Metrics())
start_http_server(9400)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from cakekv.errors import CorruptChunk, MissingChunk, StoreError, StoreFull
from cakekv.forks import on_fork
from cakekv.report.metrics import METRICS, SECONDS, Figure, figures
from cakekv.restore.report import RestoreReport
from cakekv.store.asking import Asker
from cakekv.store.base import Evicted, Store
from cakekv.store.metered import MeteredStore, Operation

if TYPE_CHECKING:
    from cakekv.store.member import Member

STATS_DEADLINE_S = 1.0
"""Seconds that a tier may take to count what it holds, when it is asked for metrics."""

_GAUGES = {
    "cakekv:tier_held_bytes": "Bytes of the chunks in the tier (memory and disk).",
    "cakekv:tier_held_chunks": "Chunks in the tier (memory and disk).",
    "cakekv:tier_capacity_bytes": "Bytes that the tier may hold, if it is bounded.",
    "cakekv:tier_up": "Whether a tier of a tiered store is in use (1) or down (0).",
    "cakekv:tier_retry_seconds": "The pause before a tier that is down is tried again; 0 while it is up.",
}
_EVICTED = {
    "cakekv:tier_evicted_chunks": "Chunks that this process evicted.",
    "cakekv:tier_evicted_bytes": "Bytes that this process evicted.",
}


class Metrics:
    """All metrics of one process. Tiers of the same name count together.

    Parameters
    ----------
    registry : CollectorRegistry
        Where to register them; a registry takes them once.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            labels = [metric.label] if metric.label else []
            if metric.kind == "counter":
                self._metrics[name] = Counter(name, metric.documentation, labels, registry=registry)
            else:
                self._metrics[name] = Histogram(
                    name, metric.documentation, labels, buckets=metric.buckets, registry=registry
                )
        of = ["tier", "operation"]
        self.operations = Counter("cakekv:tier_operations", "Look-ups, reads and writes begun.", of, registry=registry)
        self.bytes = Counter("cakekv:tier_bytes", "Bytes read and written.", of, registry=registry)
        self.failures = Counter(
            "cakekv:tier_failures", "Operations that failed, by why.", [*of, "reason"], registry=registry
        )
        self.seconds = Histogram(
            "cakekv:tier_seconds", "Seconds of operations that succeeded.", of, buckets=SECONDS, registry=registry
        )
        self.uncopied = Counter(
            "cakekv:tier_uncopied_chunks",
            "Chunks that could not be copied to the tier, which is written back.",
            ["tier"],
            registry=registry,
        )
        self.packing_saved = Counter(
            "cakekv:tier_packing_saved_bytes",
            "Bytes that packing saved of what was written to the tier.",
            ["tier"],
            registry=registry,
        )
        self._tiers = _Tiers()
        registry.register(self._tiers)

    def meter(self, store: Store) -> MeteredStore:
        """The store, measured."""
        metered = MeteredStore(store, _TierMeter(self, store.name, self._tiers))
        self._tiers.stores.add(metered)
        return metered

    def watch(self, members: Iterable[Member]) -> None:
        """Show whether these tiers of a tiered store are up."""
        self._tiers.members.update(members)

    def add_uncopied(self, tier: str, chunks: int) -> None:
        """Count chunks that could not be copied to a tier."""
        self.uncopied.labels(tier).inc(chunks)

    def add_packed(self, tier: str, saved: int) -> None:
        """Count bytes that packing saved of what was written to a tier."""
        self.packing_saved.labels(tier).inc(saved)

    def add_restore(self, report: RestoreReport) -> None:
        """Count a restore that has ended."""
        for figure in figures(report):
            self._add(figure)

    def add_save(self, outcome: str, size: int, seconds: float) -> None:
        """Count a chunk that was "saved", or was not, with the reason as the outcome."""
        if outcome != "saved":
            self._add(Figure("cakekv:unsaved_chunks", 1, outcome))
            return
        self._add(Figure("cakekv:saved_chunks", 1))
        self._add(Figure("cakekv:saved_bytes", size))
        self._add(Figure("cakekv:save_seconds", seconds))

    def _add(self, figure: Figure) -> None:
        metric = self._metrics[figure.name]
        child = metric.labels(figure.label) if METRICS[figure.name].label else metric
        if METRICS[figure.name].kind == "counter":
            child.inc(figure.value)
        else:
            child.observe(figure.value)


class _TierMeter:
    """One tier's counters; those that are always needed are looked up once."""

    def __init__(self, metrics: Metrics, tier: str, tiers: _Tiers) -> None:
        self._tier = tier
        self._failures = metrics.failures
        self._tiers = tiers
        of: tuple[Operation, ...] = ("lookup", "read", "write")
        self._operations = {operation: metrics.operations.labels(tier, operation) for operation in of}
        self._seconds = {operation: metrics.seconds.labels(tier, operation) for operation in of}
        self._bytes = {operation: metrics.bytes.labels(tier, operation) for operation in of[1:]}

    def done(self, operation: Operation, seconds: float, size: int = 0) -> None:
        self._operations[operation].inc()
        self._seconds[operation].observe(seconds)
        if size:
            self._bytes[operation].inc(size)

    def failed(self, operation: Operation, error: Exception) -> None:
        self._operations[operation].inc()
        reason = next(name for kind, name in _REASONS.items() if isinstance(error, kind))
        self._failures.labels(self._tier, operation, reason).inc()

    def closed(self, store: Store) -> None:
        self._tiers.forget(store)


_REASONS: dict[type[Exception], str] = {
    MissingChunk: "missing",
    StoreFull: "full",
    CorruptChunk: "corrupt",
    StoreError: "failed",
    Exception: "crashed",
}


class _Tiers(Collector):
    """What is asked of the tiers whenever somebody asks for metrics."""

    def __init__(self) -> None:
        self.stores: WeakSet[Store] = WeakSet()
        self.members: WeakSet[Member] = WeakSet()
        self._askers: defaultdict[str, Asker] = defaultdict(lambda: Asker(STATS_DEADLINE_S))
        self._lock = Lock()
        self._past: dict[str, Evicted] = {}
        """By tier, what was evicted by stores that are closed."""
        on_fork(self)

    def _forked(self) -> None:
        self._lock = Lock()

    def forget(self, store: Store) -> None:
        """A store is closed."""
        with self._lock:
            if store in self.stores:
                self.stores.discard(store)
                self._past[store.name] = _sum(self._past.get(store.name, Evicted()), store.evicted)

    def describe(self) -> Iterator[Family]:
        return self._families({}, {})

    def collect(self) -> Iterator[Family]:
        with self._lock:
            stores, evicted = list(self.stores), dict(self._past)
        gauges: dict[str, dict[str, float]] = {name: {} for name in _GAUGES}
        for store in stores:
            evicted[store.name] = _sum(evicted.get(store.name, Evicted()), store.evicted)
            if store.counts_cheaply:
                self._count(store, gauges)
        for member in [member for member in self.members if not member.is_closed]:
            up, pause = gauges["cakekv:tier_up"], gauges["cakekv:tier_retry_seconds"]
            up[member.name] = min(up.get(member.name, 1), int(member.is_up))
            pause[member.name] = max(pause.get(member.name, 0.0), member.retry_s)
        return self._families(gauges, evicted)

    def _count(self, store: Store, gauges: dict[str, dict[str, float]]) -> None:
        try:
            stats = self._askers[store.name].ask(store.stats).answer()
        except StoreError:
            return  # what is not known is not shown
        counts = {"held_bytes": stats.bytes, "held_chunks": stats.chunks, "capacity_bytes": stats.capacity}
        for name, value in counts.items():
            if value is not None:
                gauge = gauges[f"cakekv:tier_{name}"]
                gauge[store.name] = gauge.get(store.name, 0) + value

    @staticmethod
    def _families(gauges: dict[str, dict[str, float]], evicted: dict[str, Evicted]) -> Iterator[Family]:
        for name, documentation in _GAUGES.items():
            family = GaugeMetricFamily(name, documentation, labels=["tier"])
            for tier, value in gauges.get(name, {}).items():
                family.add_metric([tier], value)
            yield family
        for index, (name, documentation) in enumerate(_EVICTED.items()):
            counter = CounterMetricFamily(name, documentation, labels=["tier"])
            for tier, total in evicted.items():
                counter.add_metric([tier], total[index])
            yield counter


def _sum(first: Evicted, second: Evicted) -> Evicted:
    return Evicted(first.chunks + second.chunks, first.bytes + second.bytes)
