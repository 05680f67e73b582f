"""One prompt's restore on an embedded engine: the planner decides, the engine computes, the loader loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from time import monotonic
from typing import Generic, NamedTuple

from cakekv.codec.base import Segment
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import LOOK_S, check
from cakekv.embedded.loader import Kept, Loads
from cakekv.embedded.planning import Planning
from cakekv.embedded.saver import PromptSaver
from cakekv.embedded.stored import CHANGED
from cakekv.engine.base import Cache, Gate, Logits, Move
from cakekv.keys import ChunkKey
from cakekv.restore.coverage import State
from cakekv.restore.flights import Load
from cakekv.restore.planner import Span, Wait
from cakekv.restore.report import PositionRun, RestoreReport, told_apart
from cakekv.results import OnProgress, Progress
from cakekv.reuse.blend import Blend
from cakekv.reuse.serving import Serving
from cakekv.reuse.truncated import Chain

_LAST_LOADS_S = 0.3
"""Seconds that loads which were given up have to end, to be in the report. A tier that hangs costs them, too."""
_LONGEST_WAIT_S = 3600.0
"""After this long, whoever waits for a load looks again, however patient the deadline is."""


class Rest(NamedTuple):
    """A chunk of which only parts were read."""

    chunk: int
    start: int
    tokens: int
    """As of its `Load`."""
    positions: range
    """What it covers: without the prompt's last one, which is computed."""
    serving: Serving
    tiers: Sequence[int]
    """Those that have it."""
    kept: Kept


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
    keeps : bool
        Whether what is `left` of chunks will be asked for.
    """

    def __init__(
        self,
        arms: Arms[Cache, Logits],
        planning: Planning,
        token_ids: Sequence[int],
        cache: Cache,
        saver: PromptSaver | None = None,
        on_progress: OnProgress | None = None,
        keeps: bool = False,
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
        self._loads = Loads(self, keeps)
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
        self._first_coded: int | None = None
        """The first of those that a codec rounded."""
        self._blended: Sequence[int] | None = None
        """The positions that a blend computed again in all layers, once it is done."""

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
            prompt_tokens = len(self._token_ids)
            last = prompt_tokens // self._chunk_tokens * self._chunk_tokens
            self._planning.found.ends_whole = self._coverage.is_whole(last, prompt_tokens)
            self._planning.found.answer = self._chain_behind(prompt_tokens - 1)
            report.lossy_tokens = sum(tokens[chunk] for chunk in self._not_exact)
            report.after_lossy_tokens = sum(span.tokens for span in report.spans if self._saw_lossy(span.start))
            self._tell_reuse(report)
        report.ttft_s, report.lookup_s, report.codec = self._ttft_s, self._planning.found.lookup_s, codec.label
        report.notes += self.request.notes
        if not self._planning.found.still():
            report.notes.append(CHANGED)
        return report

    def left(self) -> tuple[list[Rest], list[range]]:
        """The chunks of which only parts were read, and the runs of positions that were computed behind the first."""
        coverage, codec, kept = self._coverage, self._arms.coder.codec, self._loads.kept or {}
        positions = [range(start, end) for start, end in pairwise(coverage.starts)]
        rests = []
        for chunk, parts in sorted(self._parts.items()):
            serving = self._serving(chunk)
            if serving is not None and chunk in kept and 0 < parts < codec.parts_read:
                tokens, tiers = coverage.load_tokens(chunk), coverage.holders[chunk]
                rests.append(Rest(chunk, coverage.starts[chunk], tokens, positions[chunk], serving, tiers, kept[chunk]))
        behind = range(rests[0].chunk if rests else coverage.chunks, coverage.chunks)
        return rests, [positions[chunk] for chunk in behind if coverage.state[chunk] is State.COMPUTED]

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
        report.dropped_tokens = found.dropped_tokens
        placed = (coverage.chunk_at(position) for position in self._blended or ())
        report.blended_tokens = sum(chunk in self._parts and self._is_reused(chunk) for chunk in placed)
        reused = {chunk for chunk in self._not_exact if self._is_reused(chunk)}
        if not (reused or report.blended_tokens):
            return
        if reuse is not None and found.documents:
            report.reuse = reuse.recipe
        if not reused:
            return
        moved = {chunk for chunk in reused if not found.documents and self._moved_by(chunk)}
        report.moved_tokens = sum(coverage.tokens[chunk] for chunk in moved)
        report.reused_tokens = sum(coverage.tokens[chunk] for chunk in reused - moved)
        report.linked_tokens = sum(miss.tokens for miss in report.misses if miss.reason == "linked")
        runs: list[PositionRun] = []
        for chunk, (start, tokens) in enumerate(zip(coverage.starts[:-1], coverage.tokens, strict=True)):
            if chunk in self._not_exact:
                how = "moved" if chunk in moved else "reused" if chunk in reused else "lossy"
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

    def _moved_by(self, chunk: int) -> int:
        """By how many positions what serves a chunk is moved."""
        serving = self._serving(chunk)
        assert serving is not None, "only what is stored is moved"
        return self._coverage.starts[chunk] - serving.position - serving.skip

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
        gate = self._gate if span.layered else None
        with self._arbiter.lock:
            reused = self._to_blend(span)
        try:
            if reused:
                logits = self._blend(span, reused, gate)
            else:
                logits = self._arms.engine.compute(self._cache, token_ids, span.start, gate)
        except _LoadLost:
            with self._arbiter.lock:
                self.request.woken.wait_for(lambda: not self.planner.placing or self._loads.crash is not None)
                self._loads.raise_crash()
                self.planner.gave_up(span, monotonic())
            return None
        end = span.start + span.tokens
        with self._arbiter.lock:
            self.planner.computed(span, monotonic(), self._waited_s, typical=not reused)
            for chunk in range(self._coverage.chunk_at(span.start), self._coverage.chunk_at(end)):
                if self._coverage.state[chunk] is State.COMPUTED:
                    self._parts.pop(chunk, None)
                    self._not_exact.discard(chunk)
            self.changed()
            self._arms.loader.wake()
        check()  # who was interrupted may have changed the model since
        if self._saver is not None:
            chain = self._chain_behind(span.start)
            keys = chain.keys if chain is not None else []
            saved = len(keys) if end == len(self._token_ids) else min(end // self._chunk_tokens, len(keys))
            first = span.start // self._chunk_tokens
            if not self._coverage.is_whole(first * self._chunk_tokens, span.start):
                first += 1
            missing = [chunk for chunk in range(first, saved) if self._is_missing(chunk, keys[chunk])]
            self._saver.save(missing, self._missing_chunks, chain)
        return logits

    def _to_blend(self, span: Span) -> list[int]:
        """The reused chunks to blend together with a span: all, with the first span that has none behind it."""
        is_blend = isinstance(self._arms.options.reuse, Blend) and self._planning.found.documents
        if self._blended is not None or not is_blend:
            return []
        coverage, end = self._coverage, span.start + span.tokens
        behind = range(coverage.chunk_at(end), coverage.chunks)
        if any(coverage.holders[chunk] for chunk in behind):  # and if it is computed in the end: with the last span
            return []
        return [
            chunk
            for chunk in range(coverage.chunk_at(span.start))
            if coverage.state[chunk] is not State.COMPUTED and self._is_reused(chunk)
        ]

    def _blend(self, span: Span, reused: Sequence[int], gate: Gate | None) -> Logits:
        """Compute a span with the reused chunks before it, as far as they deviate."""
        way, coverage = self._arms.options.reuse, self._coverage
        assert isinstance(way, Blend)
        assert self._cache is not None
        start, always_from = coverage.start_of(reused[0]), coverage.start_of(reused[-1] + 1)
        token_ids = self._token_ids[start : span.start + span.tokens]
        logits, self._blended = self._arms.engine.blend(self._cache, token_ids, start, always_from, way, gate)
        if len(self._blended) == len(token_ids):  # all that is not exact is before `start`
            with self._arbiter.lock:
                self._not_exact -= set(range(reused[0], reused[-1] + 1))
                if self._first_lossy == reused[0]:
                    self._first_lossy = None
        return logits

    def _chain_behind(self, start: int) -> Chain | None:
        """Under whose keys what is computed from `start` on is saved; None: it is not."""
        found = self._planning.found
        if self._blended is not None or self._saw(self._first_coded, start):
            return None
        return found.moved if self._saw_lossy(start) else found.own

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

    def _is_missing(self, chunk: int, key: ChunkKey) -> bool:
        """Whether no tier can deliver one of the chunks to save: it was not stored, or its loads failed."""
        planned = self._coverage.chunk_at(chunk * self._chunk_tokens)
        serving, held = self._serving(planned), self._coverage.holders[planned]
        return not held or serving is None or serving.key != key

    @cached_property
    def _missing_chunks(self) -> int:
        """How many of the chunks to save no tier can deliver, as far as was known when this was first asked."""
        found = self._planning.found
        if found.moved is not None:
            planned = [self._coverage.chunk_at(chunk * self._chunk_tokens) for chunk in range(len(found.keys))]
            return sum(not self._coverage.holders[chunk] for chunk in planned)
        return sum(self._is_missing(chunk, key) for chunk, key in enumerate(found.keys))

    def _saw_lossy(self, start: int) -> bool:
        """Whether what is computed from `start` on may attend to loaded keys and values that are not exact."""
        return self._saw(self._first_lossy, start)

    def _saw(self, chunk: int | None, start: int) -> bool:
        return chunk is not None and self._coverage.start_of(chunk) < start

    # -------------------------------------------------------------------- loads

    def place(self, load: Load | Rest, segments: Sequence[Segment | None]) -> int:
        """As `Restoring.place`."""
        cache = self._cache
        assert cache is not None, "a load was placed after the end of its restore"
        serving, engine = self.servings[load.chunk], self._arms.engine
        assert serving is not None, "only what is stored is loaded"
        by = load.start - serving.position - serving.skip
        if not by and not serving.skip:
            return engine.place(cache, load.start, load.tokens, segments)
        move = Move(serving.tokens, serving.skip, by, self._planning.found.rotations)
        return engine.place_moved(cache, load.start, load.tokens, segments, move)

    def placed(self, load: Load, coded: bool, size: int) -> None:
        """As `Restoring.placed`."""
        codec = self._arms.coder.codec
        self._placed_bytes += size
        self._parts[load.chunk] = (load.parts or codec.parts_read) if coded else 0
        is_coded = coded and codec.lossy
        if is_coded:
            self._first_coded = _earlier(self._first_coded, load.chunk)
        if is_coded or self._is_reused(load.chunk):
            self._not_exact.add(load.chunk)
            self._first_lossy = _earlier(self._first_lossy, load.chunk)

    def changed(self) -> None:
        """Report progress; called with the lock held."""
        if self._on_progress is None:
            return
        planner = self.planner
        latest = planner.latest
        self._arbiter.tell(
            self._on_progress,
            Progress(
                planner.mode,
                planner.prompt_tokens,
                planner.prefix_tokens,
                latest.front,
                latest.back,
                planner.coverage.bands(),
                monotonic() - self.request.arrived_s,
            ),
        )


def _earlier(first: int | None, chunk: int) -> int:
    return chunk if first is None else min(first, chunk)
