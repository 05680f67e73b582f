"""Reads the parts of chunks that a restore has left, while an answer is drafted from those that are there.

A restore that reads only the upper parts of chunks is over sooner, and what it has made is good enough to draft from,
not to answer with. The lower parts come behind it; then what was computed behind these chunks is computed again, so
that the cache is the one of a restore that has read all, and drafts are verified over that.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any

from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import LOOK_S, check
from cakekv.embedded.speculating import draft
from cakekv.errors import CorruptChunk, MissingChunk, StoreError
from cakekv.load.reading import Abandoned, Progress, failure_reason
from cakekv.restore.report import LoadRecord, Miss
from cakekv.results import Prefill

if TYPE_CHECKING:
    from cakekv.embedded.restore import EmbeddedRestore, Rest

_MOST_READERS = 8


def complete(arms: Arms[Any, Any], request: Request, restore: EmbeddedRestore[Any, Any], prefill: Prefill) -> None:
    """Complete a prefill: its cache, its logits, and its report, which get drafts of the answer meanwhile.

    What cannot be read is computed, and reported as if it had not been loaded.

    Parameters
    ----------
    arms : Arms
        The model, and where to load from.
    request : Request
        Whose it is.
    restore : EmbeddedRestore
        Has run, and still has its cache.
    prefill : Prefill
        What it has made.
    """
    rests, computed = restore.left()
    if rests:
        _Completing(arms, request, restore, prefill, rests).run(computed)


class _Completing:
    """One of them; as a `Cancellable`, its reads are given up once it is over."""

    def __init__(
        self,
        arms: Arms[Any, Any],
        request: Request,
        restore: EmbeddedRestore[Any, Any],
        prefill: Prefill,
        rests: Sequence[Rest],
    ) -> None:
        self._arms, self._request, self._restore, self._prefill = arms, request, restore, prefill
        self._unread = list(rests)
        self._missing = {rest.start: rest for rest in rests}
        """Those that are not placed yet."""
        self._reasons: dict[int, str] = {}
        self._crash: BaseException | None = None
        self._changed = threading.Condition()
        self._moved_at = monotonic()
        self._placing = threading.Lock()
        """Held by whoever writes to the cache, or reads it."""
        self.cancelled = False

    def run(self, computed: Sequence[range]) -> None:
        """Draft, wait, and compute these runs of positions again."""
        prefill, arms, sight = self._prefill, self._arms, self._arms.options.decode
        assert sight is not None
        try:
            with self._placing:
                self._hire()
                with arms.arbiter.turn(self._request):
                    view = arms.engine.look(prefill.cache, prefill.token_ids, sight)
            self._draft(view)
            del view
            self._await()
        finally:
            with self._placing:
                self.cancelled = True
        with self._changed:
            lost = sorted(self._missing.values())
        self._tell(lost)
        self._compute([*computed, *(rest.positions for rest in lost)])
        prefill.report.ttft_s = self._now()

    def _draft(self, view: Any) -> None:
        """Draft as much of the answer as there is time for."""
        prefill, engine, position = self._prefill, self._arms.engine, len(self._prefill.token_ids)
        sight: Any = self._arms.options.decode
        prefill.drafts = [int(prefill.logits.argmax())]
        prefill.report.draft_s = self._now()
        most = min(sight.gamma, engine.max_context - position - 1)

        def enough() -> bool:
            return len(prefill.drafts) > most or not self._missing

        while not enough():
            with self._arms.arbiter.turn(self._request):
                last = position + len(prefill.drafts) - 1
                more = draft(engine, view, prefill.drafts[-1], last, 1)
            if not more:
                break
            prefill.drafts += more

    def _await(self) -> None:
        """Until all is placed, or failed, or nothing has come for as long as the deadline says."""
        deadline_s = self._arms.options.deadline_s
        with self._changed:
            while self._crash is None and len(self._reasons) < len(self._missing):
                check()
                if monotonic() - self._moved_at > deadline_s:
                    break
                self._changed.wait(LOOK_S)
        if self._crash is not None:
            raise self._crash

    def _compute(self, runs: list[range]) -> None:
        """Compute runs of positions, the last of which ends with the prompt."""
        prefill, most = self._prefill, self._arms.options.max_span_tokens
        for run in sorted(runs, key=lambda run: run.start):
            for start in range(run.start, run.stop, most):
                check()
                span = prefill.token_ids[start : min(start + most, run.stop)]
                with self._arms.arbiter.turn(self._request):
                    prefill.logits = self._arms.engine.compute(prefill.cache, span, start)

    def _tell(self, rests: Sequence[Rest]) -> None:
        """Bring the report up to date: these will be computed."""
        report, codec = self._prefill.report, self._arms.coder.codec
        lost = sum(len(rest.positions) for rest in rests)
        report.misses += [
            Miss(rest.start, len(rest.positions), self._reasons.get(rest.start, "late")) for rest in rests
        ]
        report.misses.sort(key=lambda miss: miss.start)
        report.loaded_tokens -= lost
        report.lossy_tokens -= lost
        report.computed_tokens += lost
        report.recomputed_tokens += lost
        exact = report.level_tokens.get("exact", 0)
        coded = sum(report.level_tokens.values()) - exact - lost
        whole = {f"{codec.parts_read} of {codec.parts}": coded}
        report.level_tokens = {**({"exact": exact} if exact else {}), **(whole if coded else {})}

    def _now(self) -> float:
        return monotonic() - self._request.arrived_s

    # ----------------------------------------------------------- the readers' threads

    def _hire(self) -> None:
        readers = min(len(self._unread), _MOST_READERS)
        for _ in range(readers):
            threading.Thread(target=self._read_all, name="cakekv-rest", daemon=True).start()

    def _read_all(self) -> None:
        try:
            while True:
                with self._changed:
                    if self.cancelled or not self._unread:
                        return
                    rest = self._unread.pop()
                self._read(rest)
        except BaseException as crash:
            with self._changed:
                self._crash = crash
                self._changed.notify_all()

    def _read(self, rest: Rest) -> None:
        """Read a rest from the first tier that can deliver it, and place the chunk."""
        reason = "vanished from the store"
        for tier in rest.tiers:
            began, progress = self._now(), Progress()
            with ExitStack() as buffers:
                try:
                    segments = self._arms.loader.read_rest(tier, rest, self, progress, buffers)
                    with self._placing:
                        if self.cancelled:
                            return
                        self._restore.place(rest, segments)
                    reason = ""
                except Abandoned:
                    return
                except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
                    reason = failure_reason(error)
            with self._changed:
                if self.cancelled and reason:
                    return
                name, report = self._arms.tiers[tier].name, self._prefill.report
                outcome = reason or "placed"
                report.loads.append(
                    LoadRecord(rest.start, rest.tokens, name, began, self._now(), progress.bytes, outcome)
                )
                report.bytes_by_tier[name] += progress.bytes
                self._moved_at = monotonic()
                if not reason:
                    del self._missing[rest.start]
                    self._changed.notify_all()
                    return
        with self._changed:
            self._reasons[rest.start] = reason
            self._changed.notify_all()
