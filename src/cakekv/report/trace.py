"""Restores as a trace for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cakekv.restore.report import LoadRecord, RestoreReport

Event = dict[str, Any]


def trace_json(reports: Mapping[str, RestoreReport]) -> str:
    """The trace's text: one process per restore, with a track of its spans and, per tier, tracks of its loads.

    Parameters
    ----------
    reports : mapping of str to RestoreReport
        By name, such as the mode.
    """
    events = [
        event for number, (name, report) in enumerate(reports.items(), 1) for event in _process(number, name, report)
    ]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def lanes(loads: Sequence[LoadRecord]) -> list[list[LoadRecord]]:
    """Loads laid on as few lanes as they overlap: within a lane none begins before the one before it has ended."""
    laid: list[list[LoadRecord]] = []
    for load in sorted(loads, key=lambda load: load.began_s):
        for lane in laid:
            if lane[-1].ended_s <= load.began_s:
                lane.append(load)
                break
        else:
            laid.append([load])
    return laid


def _process(process: int, name: str, report: RestoreReport) -> list[Event]:
    def event(phase: str, track: int, title: str, began_s: float, **more: Any) -> Event:
        return {"ph": phase, "pid": process, "tid": track, "name": title, "ts": began_s * 1e6, **more}

    def named(kind: str, track: int, title: str) -> Event:
        return event("M", track, kind, 0.0, args={"name": title})

    events = [
        named("process_name", 0, f"{name}: TTFT {report.ttft_s:.3f} s"),
        named("thread_name", 1, "compute"),
    ]
    for span in report.spans:
        end = span.start + span.tokens
        events.append(
            event(
                "X",
                1,
                f"compute {span.start}–{end}",
                span.began_s,
                dur=(span.ended_s - span.began_s) * 1e6,
                args={"tokens": span.tokens},
            )
        )
    track = 1
    for tier in sorted({load.source for load in report.loads}):
        for number, lane in enumerate(lanes([load for load in report.loads if load.source == tier]), 1):
            track += 1
            events.append(named("thread_name", track, f"load from {tier}, lane {number}"))
            for load in lane:
                title = f"load {load.start}–{load.start + load.tokens}"
                if load.outcome != "placed":
                    title += f" ({load.outcome})"
                args = {"tokens": load.tokens, "bytes": load.bytes, "outcome": load.outcome}
                duration = (load.ended_s - load.began_s) * 1e6
                events.append(event("X", track, title, load.began_s, dur=duration, args=args))
    for point in report.frontiers:
        events.append(event("C", 0, "frontiers", point.time_s, args={"front": point.front, "back": point.back}))
    return events
