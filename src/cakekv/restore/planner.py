"""The heart: decides what one restore computes and loads next. Pure: told events with timestamps, answers decisions.

The driver (an engine with threads, vLLM's scheduler, or a simulator with a virtual clock) asks `next_compute` whenever
compute is free and `next_load` whenever a source has room, and reports what became of each answer. All calls must be
serialised by the driver.

A load runs through `next_load` -> `arrived` (may it still be placed?) -> `placed`, or ends in `abandoned` or `failed`.
A chunk that compute claims while its load is in flight flags that load as `cancelled`; its late arrival is refused.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from cakekv.restore.costs import ComputeCost, LoadCost
from cakekv.restore.plan import Candidate, assign_loads
from cakekv.restore.record import Recorder
from cakekv.restore.report import FrontierPoint, RestoreReport

Mode = Literal["auto", "compute", "load", "both"]
MODES: tuple[Mode, ...] = ("auto", "compute", "load", "both")


class State(IntEnum):
    """Where a chunk stands."""

    MISSING = 0
    STORED = 1
    LOADING = 2
    PLACING = 3
    LOADED = 4
    COMPUTING = 5
    COMPUTED = 6


_COVERED = (State.LOADED, State.COMPUTED)
_KEEP = 0.8
"""Factor on what is left of a load in flight: it is kept unless giving its bytes up clearly pays."""
_PROBE_TOKENS = 128
"""Longest span while the speed of an arm is unknown: long enough to learn from, short enough to regret."""


class Source(NamedTuple):
    """A tier to load from."""

    name: str
    cost: LoadCost
    depth: int
    """Loads to keep in flight."""


class Span(NamedTuple):
    """Compute these positions next."""

    start: int
    tokens: int


class Wait(NamedTuple):
    """Nothing to compute before a load ends; ask again after the next event, or at `until` (seconds)."""

    until: float


@dataclass(eq=False, slots=True)
class Load:
    """Load this chunk next. `cancelled` turns True when nobody needs it any more."""

    chunk: int
    start: int
    tokens: int
    source: int
    windowed: bool
    """Whether layers with a sliding window need their part, too."""
    size: int
    began: float
    cancelled: bool = False
    late: bool = False


class Restore:
    """One prompt's way from stored chunks and tokens to a complete KV cache.

    Parameters
    ----------
    prompt_tokens : int
        Length of the prompt. Its last token is always computed, since its logits are needed.
    chunk_tokens : int
        Tokens per chunk.
    stored : sequence of sequences of int
        Per chunk, from the first, the indices of the sources that hold it; chunks past the end of it are not stored.
    sources : sequence of Source
        The tiers.
    compute : ComputeCost
        What spans cost; learns from this restore.
    chunk_bytes, unwindowed_chunk_bytes : int
        Bytes to read for a chunk, and for its part of the layers without a sliding window.
    window : int or None
        Widest sliding window of the model in tokens.
    mode : {"auto", "compute", "load", "both"}
        "compute" loads nothing, "load" computes only what cannot be loaded, "both" makes both arms contribute at
        least one piece each, "auto" lets an arm that does not pay stay idle.
    max_span_tokens : int
        Longest span to compute at a time.
    patience_s : float
        A load from a source of unknown speed is given up after this long; from a known one after ten times what it
        should take, but not before two seconds.
    now : float
        Seconds on the driver's clock.
    """

    def __init__(
        self,
        prompt_tokens: int,
        chunk_tokens: int,
        stored: Sequence[Sequence[int]],
        sources: Sequence[Source],
        compute: ComputeCost,
        *,
        chunk_bytes: int,
        unwindowed_chunk_bytes: int | None = None,
        window: int | None = None,
        mode: Mode = "auto",
        max_span_tokens: int = 512,
        patience_s: float = 30.0,
        now: float = 0.0,
    ) -> None:
        if prompt_tokens < 1 or chunk_tokens < 1 or max_span_tokens < 1:
            raise ValueError(f"lengths must be positive: {prompt_tokens=}, {chunk_tokens=}, {max_span_tokens=}")
        self.prompt_tokens = prompt_tokens
        self.chunk_tokens = chunk_tokens
        self.sources = tuple(sources)
        self.compute = compute
        self.mode = mode
        self._window = window
        self._chunk_bytes = chunk_bytes
        self._unwindowed_chunk_bytes = chunk_bytes if unwindowed_chunk_bytes is None else unwindowed_chunk_bytes
        self._max_span_chunks = max(1, max_span_tokens // chunk_tokens)
        self._patience_s = patience_s
        self.chunks = -(-prompt_tokens // chunk_tokens)
        loadable = (prompt_tokens - 1) // chunk_tokens
        self._holders: list[tuple[int, ...]] = [
            tuple(stored[chunk]) if chunk < min(loadable, len(stored)) else () for chunk in range(self.chunks)
        ]
        self.state: list[State] = [State.STORED if held else State.MISSING for held in self._holders]
        self._uncovered: list[int] = list(range(self.chunks))
        """Chunks that are missing, stored or loading, ascending."""
        self._front = 0
        """First chunk that is neither covered nor being computed."""
        self._span: tuple[Span, float] | None = None
        self._inflight: dict[int, Load] = {}
        self._outstanding: list[int] = [0] * len(self.sources)
        """Loads handed out per source and not answered yet, abandoned and late ones included."""
        self._stuck: list[int] = [0] * len(self.sources)
        """Loads per source that were given up as late and not answered yet."""
        self._plan: dict[int, int] = {}
        self._queues: list[list[int]] = [[] for _ in self.sources]
        """Planned chunks per source, the one due first at the end."""
        self._changes = self.chunks
        """Chunks that changed hands since the plan was made."""
        self._unwindowed: set[int] = set()
        """Chunks that were loaded without the part of the windowed layers."""
        self._want_window: set[int] = set()
        self._requested_any = False
        prefix_chunks = max((chunk + 1 for chunk, held in enumerate(self._holders) if held), default=0)
        self._back = prefix_chunks
        self.prefix_tokens = self.start_of(prefix_chunks)
        report = RestoreReport(mode, prompt_tokens, chunk_tokens, prefix_tokens=self.prefix_tokens)
        self._record = Recorder(report, [source.name for source in self.sources], chunk_bytes / chunk_tokens, now)
        self._record.frontier(now, 0, self.start_of(self._back))

    @property
    def report(self) -> RestoreReport:
        """What has happened so far."""
        loaded = [chunk for chunk, state in enumerate(self.state) if state is State.LOADED]
        self._record.report.met_at = self.start_of(loaded[0]) if loaded else None
        self._record.misses(
            [
                (self.start_of(chunk), self.start_of(chunk + 1) - self.start_of(chunk))
                for chunk, held in enumerate(self._holders)
                if not held
            ],
            lambda start: "not stored" if start < self.prefix_tokens else "behind the stored prefix",
        )
        return self._record.report

    @property
    def latest(self) -> FrontierPoint:
        """Where both arms stand."""
        return self._record.report.frontiers[-1]

    @property
    def done(self) -> bool:
        """Whether every position is covered."""
        return self._front == self.chunks and self._span is None

    def bands(self) -> list[tuple[int, int, str]]:
        """Runs of positions in the same state, as (start, end, state's name in lower case), covering the prompt."""
        runs: list[tuple[int, int, str]] = []
        for chunk, state in enumerate(self.state):
            name = state.name.lower()
            if runs and runs[-1][2] == name:
                runs[-1] = (runs[-1][0], self.start_of(chunk + 1), name)
            else:
                runs.append((self.start_of(chunk), self.start_of(chunk + 1), name))
        return runs

    def start_of(self, chunk: int) -> int:
        """First position of a chunk, in tokens; of the chunk after the last: the prompt's end."""
        return min(chunk * self.chunk_tokens, self.prompt_tokens)

    def is_missing(self, chunk: int) -> bool:
        """Whether no source can deliver the chunk: it was not stored, or every load of it failed."""
        return not self._holders[chunk]

    # ------------------------------------------------------------------ compute

    def next_compute(self, now: float) -> Span | Wait | None:
        """What to compute next: a span (which is claimed), a wait for a load, or None when all is covered."""
        assert self._span is None, "the span before was not reported as computed"
        if self._front == self.chunks:
            return None
        self._give_up_late_loads(now)
        first = self._front
        count = self._computable(first)
        if self._stale() or count < 2 * self._max_span_chunks:
            self._replan(now)
            count = self._computable(first)
        if count == 0:
            return Wait(self._next_look(now))
        if not self._window_covered(first):
            return self.next_compute(now)
        if count > self._max_span_chunks:
            count = self._max_span_chunks if count >= 2 * self._max_span_chunks else -(-count // 2)
        for chunk in range(first, first + count):
            load = self._inflight.pop(chunk, None)
            if load is not None:
                load.cancelled = True
            self.state[chunk] = State.COMPUTING
        self._remove_uncovered(first, first + count)
        self._front = first + count
        span = Span(self.start_of(first), self.start_of(first + count) - self.start_of(first))
        self._span = (span, now)
        self._advance()
        return span

    def computed(self, span: Span, now: float) -> None:
        """The claimed span is in the cache."""
        assert self._span is not None, "no span was claimed"
        assert self._span[0] == span, f"{span} was not claimed"
        began = self._span[1]
        self._span = None
        for chunk in range(span.start // self.chunk_tokens, -(-(span.start + span.tokens) // self.chunk_tokens)):
            assert self.state[chunk] is State.COMPUTING
            self.state[chunk] = State.COMPUTED
        self.compute.observe(span.start, span.tokens, now - began)
        self._changes += span.tokens // self.chunk_tokens + 1
        self._record.span(span.start, span.tokens, began, now)
        self._record.frontier(now, span.start + span.tokens, self.start_of(self._back))

    def _computable(self, first: int) -> int:
        """How many chunks from `first` on compute should take, as far as that matters for the next span."""
        end = first
        limit = min(self.chunks, first + 2 * self._max_span_chunks)
        while end < limit and end not in self._plan and self.state[end] <= State.LOADING:
            end += 1
        if end == first:
            starved = self.mode == "both" and not self._record.report.spans and self.state[first] is State.STORED
            return int(starved)
        unsure = self._plan and any(not source.cost.known for source in self.sources)
        if unsure or not self.compute.known:
            return min(end - first, max(1, _PROBE_TOKENS // self.chunk_tokens))
        return end - first

    def _window_covered(self, first: int) -> bool:
        """Whether a span at chunk `first` finds all that its windowed layers see; takes back chunks that lack it."""
        if self._window is None:
            return True
        lowest = max(0, self.start_of(first) - self._window + 1) // self.chunk_tokens
        lacking = [chunk for chunk in range(lowest, first) if chunk in self._unwindowed]
        for chunk in lacking:
            self._record.taken_back(self.chunk_tokens, self._unwindowed_chunk_bytes)
            self._unwindowed.discard(chunk)
            self._want_window.add(chunk)
            self.state[chunk] = State.STORED
            insort(self._uncovered, chunk)
        if lacking:
            self._front = lacking[0]
        return not lacking

    # -------------------------------------------------------------------- loads

    def next_load(self, source: int, now: float) -> Load | None:
        """What `source` should load next, or None if there is nothing worth loading now (ask after the next event)."""
        if self.mode == "compute" or self._outstanding[source] >= self.sources[source].depth:
            return None
        if self._stale():
            self._replan(now)
        chunk = self._due(source)
        if chunk is None and self._changes:
            self._replan(now)
            chunk = self._due(source)
        if chunk is None:
            return None
        windowed = self._needs_window(chunk)
        size = self._chunk_bytes if windowed else self._unwindowed_chunk_bytes
        load = Load(chunk, self.start_of(chunk), self.chunk_tokens, source, windowed, size, now)
        self.state[chunk] = State.LOADING
        self._inflight[chunk] = load
        self._outstanding[source] += 1
        self._requested_any = True
        self._changes += 1
        return load

    def _due(self, source: int) -> int | None:
        """The planned chunk that `source` should load first."""
        queue = self._queues[source]
        while queue:
            chunk = queue.pop()
            if self.state[chunk] is State.STORED:
                return chunk
        if self.mode == "both" and not self._requested_any:
            stored = (chunk for chunk in reversed(self._uncovered) if source in self._holders[chunk])
            return next((chunk for chunk in stored if self.state[chunk] is State.STORED), None)
        return None

    def _needs_window(self, chunk: int) -> bool:
        """Whether compute will start at a position whose window reaches back into `chunk`."""
        if self._window is None or chunk in self._want_window:
            return True
        reach = (self.start_of(chunk + 1) + self._window - 2) // self.chunk_tokens
        behind = range(chunk + 1, min(reach, self.chunks - 1) + 1)
        return any(self.state[other] is State.MISSING for other in behind)

    def arrived(self, load: Load, now: float) -> bool:
        """All bytes of the load are in staging and verified. Returns whether to place them (then call `placed`)."""
        self._answered(load, load.size, now)
        if load.cancelled:
            self._note(load, load.size, now, "late" if load.late else "overtaken")
            return False
        self.state[load.chunk] = State.PLACING
        self._remove_uncovered(load.chunk, load.chunk + 1)
        return True

    def placed(self, load: Load, now: float) -> None:
        """The chunk is in the cache."""
        assert self.state[load.chunk] is State.PLACING
        del self._inflight[load.chunk]
        self.state[load.chunk] = State.LOADED
        if not load.windowed:
            self._unwindowed.add(load.chunk)
        self._advance()
        self._note(load, load.size, now, "placed")

    def abandoned(self, load: Load, size: int, now: float) -> None:
        """A cancelled load was given up after `size` bytes."""
        assert load.cancelled
        self._answered(load, size, now)
        self._note(load, size, now, "late" if load.late else "overtaken")

    def failed(self, load: Load, reason: str, size: int, now: float) -> None:
        """The load failed after `size` bytes; another source is tried, or the chunk becomes a hole."""
        self._answered(load, size, now)
        self._note(load, size, now, reason)
        if not load.cancelled:
            del self._inflight[load.chunk]
            self._lose(load, reason)

    def cancel_loads(self) -> None:
        """Flag every load in flight as cancelled: the restore is being given up."""
        for load in self._inflight.values():
            load.cancelled = True

    def _answered(self, load: Load, size: int, now: float) -> None:
        self._outstanding[load.source] -= 1
        if load.late:
            self._stuck[load.source] -= 1
        cost = self.sources[load.source].cost
        if not cost.known:
            self._changes = self.chunks
        cost.observe(size, load.began, now)

    def _note(self, load: Load, size: int, now: float, outcome: str) -> None:
        self._record.load(load.start, load.tokens, load.source, size, load.began, now, outcome)
        while self._back > 0 and self.state[self._back - 1] in (State.LOADED, State.MISSING):
            self._back -= 1
        self._record.frontier(now, self.latest.front, self.start_of(self._back))

    def _lose(self, load: Load, reason: str) -> None:
        """Never ask this source for this chunk again."""
        chunk = load.chunk
        self._holders[chunk] = tuple(source for source in self._holders[chunk] if source != load.source)
        self.state[chunk] = State.STORED if self._holders[chunk] else State.MISSING
        self._record.lost(load.start, reason)
        self._changes = self.chunks

    def _give_up_late_loads(self, now: float) -> None:
        for load in list(self._inflight.values()):
            if self.state[load.chunk] is State.LOADING and now >= self._deadline(load):
                load.cancelled = load.late = True
                self._stuck[load.source] += 1
                del self._inflight[load.chunk]
                self._lose(load, "late")

    def _deadline(self, load: Load) -> float:
        cost = self.sources[load.source].cost
        return load.began + (max(2.0, 10.0 * cost.duration(load.size)) if cost.known else self._patience_s)

    def _next_look(self, now: float) -> float:
        """When a wait should be thought over: a while after the next load should have ended, or must have."""
        looks = [now + 1.0]
        for load in self._inflight.values():
            looks += [self._deadline(load), now + max(0.02, self.sources[load.source].cost.duration(load.size))]
        return min(looks)

    # --------------------------------------------------------------------- plan

    def _stale(self) -> bool:
        """Whether to plan again. Far from the end that is worth doing only after so many changes."""
        return self._changes * 8 > len(self._uncovered)

    def _replan(self, now: float) -> None:
        """Decide again which chunks to load."""
        self._changes = 0
        if self.mode == "compute":
            return
        candidates = self._candidates(now)
        self._plan = assign_loads(candidates, len(self.sources), self._compute_busy_s(now))
        if self.mode == "auto" and self.compute.known:
            self._drop_short_landing(candidates, now)
        self._queues = [[] for _ in self.sources]
        due_later: list[list[int]] = [[] for _ in self.sources]
        for chunk in reversed(self._uncovered):  # nearest hole first; back to front before it
            if self.state[chunk] is State.MISSING:
                for queue, group in zip(self._queues, due_later, strict=True):
                    queue.extend(reversed(group))
                    group.clear()
            elif self.state[chunk] is State.STORED and chunk in self._plan:
                due_later[self._plan[chunk]].append(chunk)
        for queue, group in zip(self._queues, due_later, strict=True):
            queue.extend(reversed(group))

    def _drop_short_landing(self, candidates: list[Candidate], now: float) -> None:
        """Load the last chunks before the arms meet, too, if a span of their own would end later than that.

        The plan spreads a span's fixed cost over full spans, which flatters a short one.
        """
        busy_s = [0.0] * len(self.sources)
        short: list[tuple[int, int]] = []
        for chunk, _, load_s in candidates:
            if not load_s:
                break
            source = self._plan.get(chunk)
            if source is None:
                if len(short) == self._max_span_chunks:
                    return
                source = min(load_s, key=lambda source: busy_s[source] + load_s[source])
                short.append((chunk, source))
            busy_s[source] += load_s[source]
        if short:
            span_s = self.compute.seconds(self.start_of(short[0][0]), len(short) * self.chunk_tokens)
            if max(busy_s) < span_s + self._compute_busy_s(now):
                self._plan.update(short)

    def _compute_busy_s(self, now: float) -> float:
        if self._span is None:
            return 0.0
        span, began = self._span
        return max(0.0, began + self.compute.seconds(span.start, span.tokens) - now)

    def _candidates(self, now: float) -> list[Candidate]:
        """The uncovered chunks with what each would cost either way."""
        shape = self.compute.shape
        tokens = self.chunk_tokens
        fixed = shape.fixed / self._max_span_chunks + tokens * (shape.linear + 0.5 * tokens * shape.quadratic)
        slope = tokens * shape.quadratic * tokens
        if self.mode == "load":
            fixed, slope = 1e9, 0.0
        pending_s = [self._load_seconds(source, self._chunk_bytes, now) for source in range(len(self.sources))]
        if self.mode == "load":
            pending_s = [min(seconds, 1.0) for seconds in pending_s]
        by_holders: dict[tuple[int, ...], dict[int, float]] = {(): {}}
        remaining = self._inflight_seconds(now)
        candidates: list[Candidate] = []
        for chunk in self._uncovered:
            if chunk in remaining:
                load_s = {self._inflight[chunk].source: remaining[chunk]}
            else:
                held = self._holders[chunk]
                if held not in by_holders:
                    by_holders[held] = {source: pending_s[source] for source in held if not self._stalled(source)}
                load_s = by_holders[held]
            candidates.append((chunk, fixed + slope * chunk, load_s))
        return candidates

    def _stalled(self, source: int) -> bool:
        """Whether every worker of the source hangs in a load that was given up."""
        return self._stuck[source] >= self.sources[source].depth

    def _load_seconds(self, source: int, size: int, now: float) -> float:
        """Seconds that one more chunk keeps the source busy; grows while the source delivers nothing."""
        cost = self.sources[source].cost
        expected = cost.seconds(size) if cost.known else self.compute.seconds(0, self.chunk_tokens)
        waiting = [load.began for load in self._inflight.values() if load.source == source]
        if not waiting:
            return expected
        silent_s = now - max(min(waiting), cost.last_completed or min(waiting))
        return max(expected, silent_s - max(expected, cost.duration(size)))

    def _inflight_seconds(self, now: float) -> dict[int, float]:
        """For each chunk in flight, the seconds it adds to the time until its source is through with all of them."""
        remaining: dict[int, float] = {}
        for index, source in enumerate(self.sources):
            loads = sorted((load for load in self._inflight.values() if load.source == index), key=_age)
            if not loads:
                continue
            each = self._load_seconds(index, loads[0].size, now)
            busy_from = max(loads[0].began, source.cost.last_completed or loads[0].began)
            overdue_s = now - busy_from - max(each, source.cost.duration(loads[0].size))
            before = now + max(0.0, 0.5 * overdue_s)
            for place, load in enumerate(loads, start=1):
                ends = max(before, busy_from + place * each)
                remaining[load.chunk] = _KEEP * (ends - (now if place == 1 else before))
                before = ends
        return remaining

    # -------------------------------------------------------------------- state

    def _advance(self) -> None:
        while self._front < self.chunks and self.state[self._front] in _COVERED:
            self._front += 1

    def _remove_uncovered(self, first: int, end: int) -> None:
        del self._uncovered[bisect_left(self._uncovered, first) : bisect_left(self._uncovered, end)]


def _age(load: Load) -> float:
    return load.began
