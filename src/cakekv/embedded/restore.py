"""One prompt's restore on an embedded engine: the planner decides, the engine computes, the loader loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from threading import get_ident
from time import monotonic
from typing import Generic

from cakekv.codec.base import Segment
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import LOOK_S, check
from cakekv.embedded.loader import Loads
from cakekv.embedded.planning import Planning
from cakekv.embedded.saver import PromptSaver
from cakekv.embedded.stored import CHANGED
from cakekv.engine.base import Cache, Logits, Move
from cakekv.restore.coverage import State
from cakekv.restore.flights import Load
from cakekv.restore.planner import Span, Wait
from cakekv.restore.report import PositionRun, RestoreReport, told_apart
from cakekv.results import OnProgress, Progress
from cakekv.reuse.serving import Serving

_LAST_LOADS_S = 0.3
"""Seconds that loads which were given up have to end, to be in the report. A tier that hangs costs them, too."""
_LONGEST_WAIT_S = 3600.0
"""After this long, whoever waits for a load looks again, however patient the deadline is."""


class _LoadLost(Exception):
    """A load that a layered span waits for will not come."""


class EmbeddedRestore(Generic[Cache, Logits]):
    """Fills one cache with one prompt, taking turns with the other open requests. The loader's `Restoring`.

    Parameters
    ----------
    arms : Arms
        The model, and where to load from.
    planning : Planning
        Whose prompt it is, what is stored of it, and its planner.
    token_ids : sequence of int
        The prompt.
    cache : Cache
        A fresh cache of the engine, with room for the prompt.
    saver : PromptSaver or None
        Is handed the chunks that were computed, in order, while it is this request's turn.
    on_progress : callable or None
        Told of every change, from several threads.
    """

    def __init__(
        self,
        arms: Arms[Cache, Logits],
        planning: Planning,
        token_ids: Sequence[int],
        cache: Cache,
        saver: PromptSaver | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.request = planning.request
        self.planner = planning.planner
        self.servings: Sequence[Serving | None] = planning.found.servings
        self._arms = arms
        self._arbiter = arms.arbiter
        self._planning = planning
        self._token_ids = token_ids
        self._cache: Cache | None = cache
        self._saver = saver
        self._on_progress = on_progress
        self._loads = Loads(self)
        self._coverage = planning.planner.coverage
        self._chunk_tokens = arms.coder.exact.tokens
        self._group_of = [number for number, group in enumerate(arms.groups) for _ in group]
        self._waited_s = 0.0
        self._ttft_s = 0.0
        self._placed_bytes = 0
        self._parts: dict[int, int] = {}
        """For the chunks placed, whole or in pieces, how many parts of them were read; 0 for those in the exact form.
        """
        self._not_exact: set[int] = set()
        """Those of them that are not what a prefill of this prompt would compute."""
        self._first_lossy: int | None = None
        """The first chunk that ever was placed and is not exact; what was computed behind it attended to it."""

    def run(self) -> Logits:
        """Cover every position; returns the logits of the prompt's last token.

        Raises
        ------
        BaseException
            Whatever the engine or a loader thread raised; the loads in flight are cancelled first.
        """
        logits: Logits | None = None
        request, arbiter, loader = self.request, self._arbiter, self._arms.loader
        try:
            with arbiter.lock:
                arbiter.open(request, self._planning)
                if self._planning.loads:
                    loader.open(self._loads)
            while True:
                check()
                with arbiter.lock:
                    arbiter.take(request)
                    self._loads.raise_crash()
                    arbiter.weigh(monotonic())
                    answer = self.planner.next_compute(monotonic())
                    if isinstance(answer, Wait):
                        arbiter.give_back(request)
                        loader.check_late(monotonic())
                        request.woken.wait(min(max(0.0, answer.until - monotonic()), _LONGEST_WAIT_S))
                        continue
                    loader.wake()
                if answer is None:
                    break
                logits = self._compute(answer)
                with arbiter.lock:
                    arbiter.give_back(request, asks_again=True)
        except BaseException:
            self._end()
            self.release()  # a load that hangs in its tier would keep the cache
            raise
        self._end()
        assert logits is not None, "the last position is always computed"
        self._ttft_s = monotonic() - request.arrived_s
        return logits

    def report(self) -> RestoreReport:
        """What happened; asked for once, after `run` has returned (abandoned loads are given a moment to stop)."""
        codec = self._arms.coder.codec
        with self._arbiter.lock:
            self._loads.join(timeout_s=_LAST_LOADS_S)
            report = self.planner.report()
            report.placed_bytes = self._placed_bytes
            tokens, levels = self._coverage.tokens, Counter[int]()
            for chunk, parts in self._parts.items():
                levels[parts] += tokens[chunk]
            names = {parts: f"{parts} of {codec.parts}" if parts else "exact" for parts in sorted(levels)}
            report.level_tokens = {name: levels[parts] for parts, name in names.items()}
            report.lossy_tokens = sum(tokens[chunk] for chunk in self._not_exact)
            report.after_lossy_tokens = sum(span.tokens for span in report.spans if self._saw_lossy(span.start))
            self._tell_reuse(report)
        report.ttft_s, report.lookup_s, report.codec = self._ttft_s, self._planning.found.lookup_s, codec.name
        report.notes += self.request.notes
        if not self._planning.found.still():
            report.notes.append(CHANGED)
        return report

    def _tell_reuse(self, report: RestoreReport) -> None:
        """Say which positions were reused, and what was made of the others."""
        reuse, found, coverage = self._arms.options.reuse, self._planning.found, self._coverage
        report.misses = [part for miss in report.misses for part in told_apart(miss, found.linked)]
        damaged = [miss for miss in report.misses if miss.reason.startswith("corrupt")]
        found.damaged = [
            place
            for place in found.documents
            if any(miss.start < place.end and place.start < miss.start + miss.tokens for miss in damaged)
        ]
        reused = {chunk for chunk in self._not_exact if self._is_reused(chunk)}
        if reuse is None or not reused:
            return
        report.reuse = reuse.recipe
        report.reused_tokens = sum(coverage.tokens[chunk] for chunk in reused)
        report.linked_tokens = sum(miss.tokens for miss in report.misses if miss.reason == "linked")
        runs: list[PositionRun] = []
        for chunk, (start, tokens) in enumerate(zip(coverage.starts[:-1], coverage.tokens, strict=True)):
            if chunk in self._not_exact:
                how = "reused" if chunk in reused else "lossy"
            else:
                is_computed = coverage.state[chunk] is State.COMPUTED
                how = "recomputed" if is_computed and self._saw_lossy(start) else "exact"
            if runs and runs[-1].how == how:
                runs[-1] = runs[-1]._replace(tokens=runs[-1].tokens + tokens)
            else:
                runs.append(PositionRun(start, tokens, how))
        report.positions = runs

    def _is_reused(self, chunk: int) -> bool:
        """Whether what serves a chunk was computed behind something else."""
        serving = self._serving(chunk)
        return serving is not None and not serving.exact

    def _serving(self, chunk: int) -> Serving | None:
        """What serves a chunk, if it is stored; behind the last full one of a plain prompt nothing is."""
        return self.servings[chunk] if chunk < len(self.servings) else None

    def release(self) -> None:
        """Let go of the cache, which workers that still hang in a tier would keep."""
        self._cache = self._saver = None

    def _end(self) -> None:
        with self._arbiter.lock:
            try:
                self._arms.loader.close(self._loads)
            finally:
                self._arbiter.close(self.request)

    # ------------------------------------------------------------------ compute

    def _compute(self, span: Span) -> Logits | None:
        """Compute a span; None if it had to be given up."""
        assert self._cache is not None
        token_ids = self._token_ids[span.start : span.start + span.tokens]
        self._waited_s = 0.0
        try:
            logits = self._arms.engine.compute(self._cache, token_ids, span.start, self._gate if span.layered else None)
        except _LoadLost:
            with self._arbiter.lock:
                self.request.woken.wait_for(lambda: not self.planner.placing or self._loads.crash is not None)
                self._loads.raise_crash()
                self.planner.gave_up(span, monotonic())
            return None
        end = span.start + span.tokens
        with self._arbiter.lock:
            self.planner.computed(span, monotonic(), self._waited_s)
            for chunk in range(self._coverage.chunk_at(span.start), self._coverage.chunk_at(end)):
                if self._coverage.state[chunk] is State.COMPUTED:
                    self._parts.pop(chunk, None)
                    self._not_exact.discard(chunk)
            self.changed()
            self._arms.loader.wake()
        check()  # who was interrupted may have changed the model since
        if self._saver is not None:
            keys = self._planning.found.keys
            saved = len(keys) if end == len(self._token_ids) else end // self._chunk_tokens
            missing = [chunk for chunk in range(span.start // self._chunk_tokens, saved) if self._is_missing(chunk)]
            self._saver.save(missing, self._missing_chunks, exact=not self._saw_lossy(span.start))
        return logits

    def _gate(self, layer: int) -> None:
        """Wait until what `layer` sees before the suffix is in place; others may compute meanwhile."""
        check()
        group = self._group_of[layer]
        with self._arbiter.lock:
            if self.planner.layer_ready(group):
                return
            began = monotonic()
            self._arbiter.give_back(self.request)
            while not self.planner.layer_ready(group):
                check()
                self._loads.raise_crash()
                self._arms.loader.check_late(monotonic())
                if self.planner.lost:
                    raise _LoadLost
                self.request.woken.wait(LOOK_S)
            self._arbiter.take(self.request)
            self._waited_s += monotonic() - began

    def _is_missing(self, chunk: int) -> bool:
        """Whether no tier can deliver one of the chunks to save: it was not stored, or its loads failed."""
        planned = self._coverage.chunk_at(chunk * self._chunk_tokens)
        serving, held = self._serving(planned), self._coverage.holders[planned]
        return not held or serving is None or serving.key != self._planning.found.keys[chunk]

    @cached_property
    def _missing_chunks(self) -> int:
        """How many of the chunks to save no tier can deliver, as far as was known when this was first asked."""
        return sum(map(self._is_missing, range(len(self._planning.found.keys))))

    def _saw_lossy(self, start: int) -> bool:
        """Whether what is computed from `start` on may attend to loaded keys and values that are not exact."""
        return self._first_lossy is not None and self._coverage.start_of(self._first_lossy) < start

    # -------------------------------------------------------------------- loads

    def place(self, load: Load, segments: Sequence[Segment | None]) -> int:
        """As `Restoring.place`."""
        cache = self._cache
        assert cache is not None, "a load was placed after the end of its restore"
        serving, engine = self.servings[load.chunk], self._arms.engine
        assert serving is not None, "only what is stored is loaded"
        by = load.start - serving.position - serving.skip
        if not by and not serving.skip:
            return engine.place(cache, load.start, load.tokens, segments)
        move = Move(serving.tokens, serving.skip, by, self._arms.rotations)
        return engine.place_moved(cache, load.start, load.tokens, segments, move)

    def placed(self, load: Load, coded: bool, size: int) -> None:
        """As `Restoring.placed`."""
        codec = self._arms.coder.codec
        self._placed_bytes += size
        self._parts[load.chunk] = (load.parts or codec.parts_read) if coded else 0
        if (coded and codec.lossy) or self._is_reused(load.chunk):
            self._not_exact.add(load.chunk)
            first = self._first_lossy
            self._first_lossy = load.chunk if first is None else min(first, load.chunk)

    def changed(self) -> None:
        """Report progress; called with the lock held."""
        if self._on_progress is None:
            return
        planner = self.planner
        latest = planner.latest
        self._arbiter.teller = get_ident()
        try:
            self._on_progress(
                Progress(
                    planner.mode,
                    planner.prompt_tokens,
                    planner.prefix_tokens,
                    latest.front,
                    latest.back,
                    planner.coverage.bands(),
                    monotonic() - self.request.arrived_s,
                )
            )
        finally:
            self._arbiter.teller = None
