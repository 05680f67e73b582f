"""What is counted of restores and saves, under the same names in the library and in the vLLM plug-in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from cakekv.restore.report import RestoreReport

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SHARES = tuple(tenth / 10 for tenth in range(11))


class Metric(NamedTuple):
    """One Prometheus metric."""

    kind: Literal["counter", "histogram"]
    documentation: str
    label: str | None = None
    """What it is split by, besides what all are split by."""
    buckets: tuple[float, ...] = SECONDS


class Figure(NamedTuple):
    """What is to be added to a counter, or observed by a histogram."""

    name: str
    value: float
    label: str = ""


METRICS: dict[str, Metric] = {
    "cakekv:restores": Metric("counter", "Requests whose prompt had stored chunks and was restored.", "mode"),
    "cakekv:computed_tokens": Metric("counter", "Tokens of restored prompts that were computed."),
    "cakekv:loaded_tokens": Metric("counter", "Tokens of restored prompts that were loaded."),
    "cakekv:recomputed_tokens": Metric("counter", "Tokens computed although a chunk was stored for them."),
    "cakekv:lossy_tokens": Metric("counter", "Tokens of restored prompts that were loaded, and are not exact."),
    "cakekv:reused_tokens": Metric("counter", "Those of them that are documents' tokens, computed elsewhere."),
    "cakekv:linked_tokens": Metric("counter", "Tokens of stored documents that were computed where they stand."),
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
    "cakekv:saved_chunks": Metric("counter", "Chunks that were saved; of several workers, each counts its share."),
    "cakekv:saved_bytes": Metric("counter", "Bytes that were saved."),
    "cakekv:unsaved_chunks": Metric("counter", "Chunks, or shares of chunks, that were not saved, by why.", "reason"),
    "cakekv:save_seconds": Metric("histogram", "Seconds of writing a chunk, or a worker's share of one."),
}
"""All of them by name; Prometheus shows counters with "_total" behind it."""


def figures(report: RestoreReport) -> Iterator[Figure]:
    """What a restore that has ended adds to the metrics."""
    yield Figure("cakekv:restores", 1, report.mode)
    yield Figure("cakekv:computed_tokens", report.computed_tokens)
    yield Figure("cakekv:loaded_tokens", report.loaded_tokens)
    yield Figure("cakekv:recomputed_tokens", report.recomputed_tokens)
    yield Figure("cakekv:lossy_tokens", report.lossy_tokens)
    yield Figure("cakekv:reused_tokens", report.reused_tokens)
    yield Figure("cakekv:linked_tokens", report.linked_tokens)
    yield Figure("cakekv:after_lossy_tokens", report.after_lossy_tokens)
    yield Figure("cakekv:wasted_bytes", report.wasted_bytes)
    yield Figure("cakekv:lookup_seconds", report.lookup_s)
    yield Figure("cakekv:restore_seconds", report.ttft_s)
    computing_s = sum(span.ended_s - span.began_s for span in report.spans)
    yield Figure("cakekv:waiting_seconds", max(0.0, report.ttft_s - computing_s))
    if report.loaded_tokens and report.prefix_tokens:
        yield Figure("cakekv:meeting_point", (report.met_at or 0) / report.prefix_tokens)
    for reason, tokens in report.miss_reasons().items():
        yield Figure("cakekv:missed_tokens", tokens, kind_of(reason))
    for tier, size in report.bytes_by_tier.items():
        yield Figure("cakekv:read_bytes", size, tier)
    for load in report.loads:
        if load.outcome == "placed":
            yield Figure("cakekv:load_seconds", load.ended_s - load.began_s, load.source)
        elif load.outcome not in ("overtaken", "moved"):
            yield Figure("cakekv:failed_loads", 1, kind_of(load.outcome))


def kind_of(reason: str) -> str:
    """A reason without its particulars, as a label: "corrupt: a segment ..." becomes "corrupt"."""
    return reason.partition(":")[0].strip()[:60]
