"""Reads a prefix as the queries of its first tokens ask for it, and the rest while an answer is computed.

Beside its chunks, a sight may have stored what it selects by, and the rows in that order (`decode/sidecar.py`). Then
the suffix is computed over a cache that is still almost empty: each layer waits for the rows that its queries select,
and for no others. Reads that a layer waits for go first, then what the last queries found most promising.

What cannot be trusted is not placed: a prompt whose first token has not come is restored whole instead, and an answer
that has begun goes on over a prompt that is restored again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from cakekv.embedded.answering import Piece
from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import LOOK_S, check, in_call
from cakekv.embedded.recall_readers import AT_ONCE, STUCK_S, Job, RecallReaders, Urgency
from cakekv.embedded.stored import Found
from cakekv.errors import ChunkFault, CorruptChunk, MissingChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.load.reading import failure_reason
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.options import Mode
from cakekv.restore.recall import RecallShape, Spread, by_promise, recalled_from
from cakekv.restore.report import FrontierPoint, LoadRecord, RestoreReport, SpanRecord
from cakekv.results import OnProgress, Prefill, Progress
from cakekv.store.base import ChunkReader, Store

if TYPE_CHECKING:
    import torch

    from cakekv.decode.sidecar import Beginning, Rows, Sidecar

_SUFFIX_SPAN = 256
"""Tokens of the suffix that are computed at once, and see the same."""
_LAST_READS_S = 0.3
"""Seconds that reads which were given up have to end, to be in the report. A tier that hangs costs them, too."""
Place = tuple[int, int]
"""Which sidecar, and which of its segments."""
Again = Callable[["Sidecar | None"], Prefill]
Outside = Callable[[Callable[[], None]], None]
"""Runs something in a thread that is never interrupted."""


class RecallLost(StoreError):
    """Rows that a layer waits for will not come.

    Parameters
    ----------
    reason : str
        As reports say it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the rest of a prefix is not read any more ({reason}): prefill the prompt again")
        self.reason = reason


class Planned(NamedTuple):
    """How a prompt is to be recalled."""

    front: int
    """What is before it is computed."""
    end: int
    """What is from there on, too."""
    tier: int
    mode: Mode


class Recaller:
    """Decides whether prompts are recalled, and does so.

    Parameters
    ----------
    arms : Arms
        The model, what both arms cost, and the options.
    stores : sequence of Store
        The tiers.
    outside : callable
        Does something in a thread that is never interrupted, and waits for it.
    """

    def __init__(self, arms: Arms[Any, Any], stores: Sequence[Store], outside: Outside) -> None:
        self._arms = arms
        self._outside = outside
        self._readers = [RecallReaders(arms, tier, store) for tier, store in enumerate(stores)]
        self._spread = Spread()
        self._open: WeakSet[Reading] = WeakSet()

    def planned(self, found: Found, prompt_tokens: int, mode: Mode) -> Planned | None:
        """How a prompt is recalled; None if it is restored whole.

        Parameters
        ----------
        found : Found
            What is stored of the prompt.
        prompt_tokens : int
            Its length.
        mode : {"auto", "compute", "load", "both"}
            As in `PlannerOptions`. With "load", whatever can be is recalled, however long it takes; with "compute" and
            "both" nothing is.
        """
        arms, sight, beside = self._arms, self._arms.options.decode, found.beside
        if sight is None or not sight.lazy or beside is None or mode not in ("auto", "load") or found.starts:
            return None
        sidecars: list[Sidecar] = []
        for sidecar in beside.wanted:
            tier = beside.tiers.get(sidecar)
            if tier is None or tier != beside.tiers[beside.wanted[0]] or sidecar.end >= prompt_tokens:
                break
            sidecars.append(sidecar)
        tokens, stored = arms.coder.exact.tokens, sum(1 for _ in takewhile(bool, found.holders))
        if not sidecars or sidecars[-1].end <= sight.budget or stored < len(found.keys):
            return None  # chunks of the prompt that are not stored should be computed exactly, and saved
        end, tier = sidecars[-1].end, beside.tiers[sidecars[0]]
        with self._readers[tier].lock:
            if self._readers[tier].hangs:
                return None
        if mode == "load":
            return Planned(0, end, tier, mode)
        layout = arms.engine.layout
        whole = [layer.token_bytes for number, layer in enumerate(layout.layers) if not sight.groups_layer(number)]
        shape = RecallShape(
            [0, *(one.end for one in sidecars)],
            layout.token_bytes,
            beside.token_bytes,
            sum(whole),
            self._spread.share(sight.budget, end),
            len(layout.layers) - len(whole),
        )
        with arms.arbiter.lock:
            chunk_bytes = max(found.sizes[tier], default=arms.coder.exact.total_bytes)
            load, compute = arms.tiers[tier].cost, arms.compute_cost
            front = recalled_from(shape, prompt_tokens, stored * tokens, compute, load, chunk_bytes, tokens)
        return None if front is None else Planned(front, end, tier, mode)

    def runs(self, plan: Planned, prompt_tokens: int) -> list[PlannedRun]:
        """A plan in words, as `Planner.explain`."""
        compute, (front, end, tier, _) = self._arms.compute_cost, plan
        why = "as queries ask for it; the rest while the answer is computed"
        suffix_s = compute.seconds(end, prompt_tokens - end)
        runs = [
            PlannedRun(0, front, "compute", "while clusters are read", compute.seconds(0, max(1, front))),
            PlannedRun(front, end - front, self._arms.tiers[tier].name, why, 0.0),
            PlannedRun(end, prompt_tokens - end, "compute", "behind the clusters", suffix_s),
        ]
        return [run for run in runs if run.tokens]

    def recall(
        self,
        request: Request,
        found: Found,
        plan: Planned,
        token_ids: list[int],
        capacity: int,
        again: Again,
        tell: OnProgress | None,
    ) -> Prefill | Reading | None:
        """Compute a prompt's suffix over what its queries select; or what was read of that in vain, if anything.

        Parameters
        ----------
        request : Request
            Whose it is; is told in a note why it was given up.
        found : Found
            What is stored of the prompt.
        plan : Planned
            What to do.
        token_ids : list of int
            The prompt.
        capacity : int
            Tokens that the cache has room for.
        again : callable
            Restores the prompt whole, given the sidecar that is damaged, if one is.
        tell : callable or None
            Is told of every span.
        """
        beside = found.beside
        assert beside is not None
        beside.spans([])
        wanted = [one for one in beside.wanted if one.end <= plan.end]
        beginnings = {one: beside.beginnings[one] for one in wanted if one in beside.beginnings}
        if len(beginnings) < len(wanted):
            return None  # who restores it whole is told why
        read_bytes = [beside.read_bytes[one] for one in beginnings]
        readers = self._readers[plan.tier]
        reading = Reading(self._arms, readers, request, plan, beginnings, read_bytes, again, self._outside, tell)
        self._open.add(reading)
        try:
            prefill = reading.prefill(token_ids, capacity)
        except RecallLost as lost:
            request.notes.append(
                f"What the first token selects could not be read ({lost.reason}), so the prompt was restored whole."
            )
            if reading.damaged is not None:
                beside.distrust(reading.damaged)
            return reading
        finally:
            if not reading.has_begun:
                reading.stop()
        sight = self._arms.options.decode
        assert sight is not None
        self._spread.observe(reading.selected_share, sight.budget, plan.end)
        return prefill

    def close(self) -> None:
        """Read nothing more for anybody."""
        for reading in list(self._open):
            reading.stop()
        for readers in self._readers:
            readers.join(STUCK_S)


def reading_until(pieces: Iterator[Piece], prefill: Prefill) -> Iterator[Piece]:
    """The pieces of an answer; once it ends, or nobody wants more of it, nothing more of its prompt is read."""
    try:
        yield from pieces
    finally:
        if prefill.recall is not None:
            prefill.recall.stop()


def restored_again(prefill: Prefill, lost: RecallLost) -> None:
    """Replace a prefill's cache, the rest of which could not be read, by one that was restored whole."""
    reading, report = prefill.recall, prefill.report
    assert reading is not None
    whole = reading.again(reading.damaged)
    prefill.cache, prefill.recall = whole.cache, None
    for tier, size in whole.report.bytes_by_tier.items():
        report.bytes_by_tier[tier] = report.bytes_by_tier.get(tier, 0) + size
    report.wasted_bytes += whole.report.wasted_bytes
    report.wasted_tokens += whole.report.wasted_tokens
    report.notes.append(
        f"The rest of the prefix could not be read ({lost.reason}), so the prompt was restored again, whole, while its "
        f"answer was computed: {whole.report.loaded_tokens} tokens loaded, {whole.report.computed_tokens} computed."
    )
    report.notes += [note for note in whole.report.notes if note not in report.notes]


class _Layer:
    """The rows of one layer."""

    def __init__(self, heads: int, end: int, planes: Sequence[torch.Tensor]) -> None:
        import torch

        self.planes = planes
        self.missing = torch.zeros((heads, end), dtype=torch.bool, device="cpu")
        self.place = torch.zeros((heads, end), dtype=torch.int64, device="cpu")
        """Where each missing row is to be had: an index into all places."""
        self.scores: torch.Tensor | None = None
        """(heads, groups): what the last queries think of the groups."""


class Reading:
    """What is read of one prompt, by threads that all recalls share. A `Recalling`.

    Parameters
    ----------
    arms : Arms
        The model, what both arms cost, and the options.
    readers : RecallReaders
        Of the tier that it is read from; their lock guards what is read.
    request : Request
        Whose it is.
    plan : Planned
        How it is read.
    beginnings : mapping
        Its sidecars, from the first.
    read_bytes : sequence of int
        What was read of each so far.
    again : callable
        Restores the prompt whole, given the sidecar that is damaged, if one is.
    outside : callable
        Does something in a thread that is never interrupted: locks are taken in no other.
    tell : callable or None
        Is told of every span.

    Attributes
    ----------
    damaged : Sidecar or None
        The one that could not be trusted.
    again : callable
        Restores the prompt whole, given the sidecar that is damaged, if one is.
    has_begun : bool
        Whether the first token has come.
    selected_share : float
        Of the rows of layers that select, the part that was read until then.
    """

    def __init__(
        self,
        arms: Arms[Any, Any],
        readers: RecallReaders,
        request: Request,
        plan: Planned,
        beginnings: Mapping[Sidecar, Beginning],
        read_bytes: Sequence[int],
        again: Again,
        outside: Outside,
        tell: OnProgress | None = None,
    ) -> None:
        self._arms, self._readers, self._request, self._plan = arms, readers, request, plan
        self._outside = outside
        self._sidecars, self._beginnings = list(beginnings), list(beginnings.values())
        self._places: list[Place] = []
        self._rows: list[Rows] = []
        """Of each place."""
        self._groups: list[int] = []
        """Of each place: the number of its group in its head, counted through the prompt; -1 for none."""
        self._view: Any = None
        self._layers: list[_Layer] = []
        self._changed = threading.Condition(readers.lock)
        """Guards the following, and the report."""
        self._wanted: list[int] = []
        """What layers wait for, in the order of the bytes."""
        self._unread: dict[tuple[int, int], list[int]] = defaultdict(list)
        """The rest, by sidecar and layer, likewise."""
        self._order: list[tuple[int, int]] = []
        self._taken: set[int] = set()
        """What somebody reads, or has read."""
        self._missing: set[int] = set()
        """What is not placed yet."""
        self._reads_rest = self._is_sorted = False
        self.stopped = False
        self._layer_waits = self._all_is_awaited = False
        self._beginning_bytes = sum(read_bytes)
        self._bytes = [*read_bytes]
        """Read of each, its beginning included."""
        self._told = 0
        """How much of that the report has."""
        self._report: RestoreReport | None = None
        self._began_s = 0.0
        self._crash: BaseException | None = None
        self._lost = ""
        self.damaged: Sidecar | None = None
        self.again = again
        self._on_progress = tell
        self.has_begun = False
        self.selected_share = 0.0

    # ------------------------------------------------------------------ the thread that computes

    def prefill(self, token_ids: list[int], capacity: int) -> Prefill:
        """Compute the front and the suffix; raises `RecallLost` if rows do not come."""
        arms, engine, plan, options = self._arms, self._arms.engine, self._plan, self._arms.options
        tokens, sight = len(token_ids), options.decode
        assert sight is not None
        report = RestoreReport(
            plan.mode, tokens, options.chunk_tokens, prefix_tokens=plan.end, codec=arms.coder.codec.label
        )
        report.bytes_by_tier = {tier.name: 0 for tier in arms.tiers}
        report.lookup_s = self._began_s = self._now()
        spans: dict[int, dict[int, Any]] = defaultdict(dict)
        for sidecar, beginning in zip(self._sidecars, self._beginnings, strict=True):
            for layer, known in beginning.groups.items():
                spans[layer][sidecar.end] = known
        cache = engine.new_cache(capacity)
        view = self._view = engine.begin_recall(cache, plan.end, sight, spans)
        first = self._lay_out(view)
        for own in self._layers:
            for plane in own.planes:
                if plane.device.type != "cpu":  # fresh memory is zeros there; elsewhere it may hold what is no number
                    plane[:, : plan.end].zero_()
        with self._changed:
            self._ask(first)
            self._readers.open(self)
        for start in range(0, plan.front, options.max_span_tokens):
            self._compute(cache, token_ids[: plan.front], start, start + options.max_span_tokens, report)
        self._await(first)
        self._hand_over()
        logits = None
        for start in range(plan.end, tokens, _SUFFIX_SPAN):
            logits = self._compute(view, token_ids, start, start + _SUFFIX_SPAN, report)
        report.kept_share, report.cache_bytes, report.decode = view.kept_share, view.held_bytes, sight.recipe
        report.loaded_tokens = report.recalled_tokens = plan.end - plan.front
        report.after_lossy_tokens, report.met_at = tokens - plan.end, plan.front
        report.notes += self._request.notes
        with self._changed:
            report.ttft_s = self._now()
            report.first_read_bytes = sum(self._bytes)
            self.has_begun = True
            grouped = [place for place, group in enumerate(self._groups) if group >= 0]
            read = sum(self._size(place) for place in grouped if place in self._taken)
            self.selected_share = read / max(1, sum(map(self._size, grouped)))
            self._report = report
            self._reads_rest = True
            self._tell()
            self._readers.wake()
        return Prefill(token_ids, view, logits, report, recall=self)

    def stop(self) -> None:
        """Read nothing more."""
        if not self.stopped:
            self._safely(self._stop)

    def settle(self) -> None:
        """Wait until everything is there; raises `RecallLost` if it will not be."""
        self._safely(self._settle)

    def count_in(self, report: RestoreReport) -> None:
        """Count what was read in vain in the report of the restore that came instead; of beginnings it knows."""
        self._readers.await_last(self, _LAST_READS_S)
        with self._changed:
            size, name, ended = sum(self._bytes) - self._beginning_bytes, self._name, self._now()
            report.bytes_by_tier[name] += size
            report.wasted_bytes += size
            report.wasted_tokens += round(size / self._arms.engine.layout.token_bytes)
            report.loads[:0] = self._records(ended)

    def _safely(self, work: Callable[[], None]) -> None:
        """Do what takes locks: not in the main thread, where an interrupt might leave them taken for ever."""
        if threading.current_thread() is threading.main_thread() and not in_call():
            self._outside(work)
        else:
            work()

    def _stop(self) -> None:
        with self._changed:
            self._end()
            self._tell()

    def _settle(self) -> None:
        with self._changed:
            self._reads_rest = self._all_is_awaited = True
            self._readers.wake()
        self._await(range(len(self._places)))

    def _compute(self, cache: Any, token_ids: list[int], start: int, end: int, report: RestoreReport) -> Any:
        """Compute a span, or as much of it as there is."""
        check()
        began, span = self._now(), token_ids[start:end]
        with self._arms.arbiter.turn(self._request):
            logits = self._arms.engine.compute(cache, span, start)
        report.spans.append(SpanRecord(start, len(span), began, self._now()))
        report.frontiers.append(FrontierPoint(self._now(), start + len(span), self._plan.front))
        report.computed_tokens += len(span)
        if self._on_progress is not None:
            self._show(self._on_progress, start + len(span), report)
        return logits

    def _show(self, on_progress: OnProgress, computed: int, report: RestoreReport) -> None:
        """Tell of progress: computed is the front, and the suffix once its turn has come."""
        (front, end, _, mode), length, arbiter = self._plan, report.prompt_tokens, self._arms.arbiter
        begun, behind = min(computed, front), max(end, computed)
        runs = [
            (0, begun, "computed"),
            (begun, front, "missing"),
            (front, end, "loaded" if computed == length else "loading"),
            (end, behind, "computed"),
            (behind, length, "missing"),
        ]
        bands = [run for run in runs if run[0] < run[1]]
        with arbiter.lock:
            arbiter.tell(on_progress, Progress(mode, length, end, computed, front, bands, self._now()))

    def _lay_out(self, view: Any) -> list[int]:
        """Find out where all rows are to be had; returns the places of those that are needed before anything else."""
        plan, first = self._plan, []
        layout = self._arms.engine.layout.layers
        for shape, kept in zip(layout, view.stored, strict=True):
            self._layers.append(_Layer(shape.planes[0].heads, plan.end, kept.planes))
        known = [0] * len(layout)
        for number, (sidecar, beginning) in enumerate(zip(self._sidecars, self._beginnings, strict=True)):
            last, group = (-1, -1), -1
            for rows in beginning.rows:
                at = (rows.layer, rows.head)
                group, last = (group + 1 if at == last else -1), at
                if sidecar.start < plan.front or not len(rows.positions):
                    continue
                layer, place = self._layers[rows.layer], len(self._places)
                layer.place[rows.head, rows.positions] = place
                layer.missing[rows.head, rows.positions] = True
                self._places.append((number, rows.segment))
                self._rows.append(rows)
                self._groups.append(group if group < 0 else known[rows.layer] + group)
                self._unread[number, rows.layer].append(place)
                if group < 0:
                    first.append(place)
            for index, groups in beginning.groups.items():
                known[index] += groups.sizes.shape[1]
        self._missing = set(range(len(self._places)))
        self._order = list(self._unread)
        return first

    def _hand_over(self) -> None:
        """Have each layer that selects ask for what it selects."""
        from cakekv.decode.groups import RECALL, Recall

        for layer, kept in zip(self._layers, self._view.stored, strict=True):
            if bool(layer.missing.any()):
                kept.memo[RECALL] = Recall(partial(self._entries, layer), partial(self._scored, layer), self.settle)

    def _entries(self, layer: _Layer, entries: torch.Tensor) -> None:
        """As `Recall.entries`."""
        wanted = entries.flatten(1).cpu()
        wanted = wanted.where(wanted < layer.missing.shape[1], 0)  # what is newer is there; so are the sinks
        places = set(layer.place.gather(1, wanted)[layer.missing.gather(1, wanted)].tolist())
        if places:
            self._safely(partial(self._fetch, places))

    def _scored(self, layer: _Layer, scores: torch.Tensor) -> None:
        """As `Recall.scored`."""
        layer.scores = scores

    def _fetch(self, places: Iterable[int]) -> None:
        """Have these be read before anything else, in mid-forward."""
        with self._changed:
            self._ask(places)
            self._layer_waits = True
            self._readers.wake()
        try:
            self._await(places)
        finally:
            with self._changed:
                self._layer_waits = False

    def _await(self, places: Iterable[int]) -> None:
        """Until these are placed, or nothing has come for as long as tiers are waited for."""
        with self._changed:
            self._raise_trouble(places)
        patience_s, began = self._readers.patience_s(AT_ONCE), monotonic()
        with self._changed:
            while self._raise_trouble(places):
                check()
                self._readers.check_late(monotonic())
                if not self._readers.is_busy_with(self) and self._readers.is_silent(began, monotonic(), patience_s):
                    self.lose("late")
                    continue
                self._changed.wait(LOOK_S)

    def _now(self) -> float:
        return monotonic() - self._request.arrived_s

    @property
    def _name(self) -> str:
        return self._arms.tiers[self._plan.tier].name

    # ------------------------------------------------------------------ called with the lock held

    @property
    def urgency(self) -> Urgency:
        """As in `Recalling`."""
        if self._layer_waits:
            return Urgency.LAYER
        return Urgency.ALL if self._all_is_awaited else Urgency.REST if self.has_begun else Urgency.FIRST

    def _raise_trouble(self, places: Iterable[int]) -> bool:
        """Whether some of these are still to come; raises why, if they will not."""
        if self._missing.isdisjoint(places):
            return False
        if self._crash is not None:
            raise self._crash
        if self.stopped:
            raise RecallLost(self._lost or "its answer is over")
        return True

    def _ask(self, places: Iterable[int]) -> None:
        """Have these be read before the rest."""
        self._wanted = sorted({*self._wanted, *(place for place in places if place not in self._taken)})

    def _sort(self) -> None:
        """Have what promises most be read next of the rest."""
        scores = {number: layer.scores for number, layer in enumerate(self._layers) if layer.scores is not None}
        ranks = {number: one.argsort(-1, descending=True).argsort(-1).tolist() for number, one in scores.items()}
        units: dict[tuple[int, int], list[float]] = {}
        for unit in self._order:
            left = [place for place in self._unread[unit] if place not in self._taken and self._groups[place] >= 0]
            if left and unit[1] in ranks:
                units[unit] = [ranks[unit[1]][self._rows[place].head][self._groups[place]] for place in left]
            else:
                units[unit] = [0.0]
        self._order, self._is_sorted = by_promise(units), True

    def next_job(self) -> Job | None:
        """As in `Recalling`."""
        if self.stopped:
            return None
        if self._wanted:
            batch = self._adjacent(self._wanted)
            self._wanted = self._wanted[len(batch) :]
            return self._job(batch)
        if not self._reads_rest:
            return None
        if not self._is_sorted:
            self._sort()
        while self._order:
            left = [place for place in self._unread[self._order[0]] if place not in self._taken]
            if left:
                return self._job(self._adjacent(left))
            self._order.pop(0)
        return None

    def _job(self, batch: Sequence[int]) -> Job:
        return Job(self, self._places[batch[0]][0], batch, sum(map(self._size, batch)))

    def _adjacent(self, places: Sequence[int]) -> list[int]:
        """The first of these, with those behind it as far as their bytes are next to each other."""
        batch, size = [places[0]], self._size(places[0])
        for place in places[1:]:
            size += self._size(place)
            (sidecar, segment), (before, last) = self._places[place], self._places[batch[-1]]
            if sidecar != before or segment != last + 1 or size > AT_ONCE:
                break
            batch.append(place)
        self._taken.update(batch)
        return batch

    def _size(self, place: int) -> int:
        sidecar, segment = self._places[place]
        return self._beginnings[sidecar].header.lengths[segment]

    def key_of(self, sidecar: int) -> ChunkKey:
        """As in `Recalling`."""
        return self._sidecars[sidecar].key

    def ended(self, job: Job) -> None:
        """As in `Recalling`."""
        from cakekv.decode.groups import RECALL

        self._tell()
        if not self._missing:
            self._end()
            for kept in self._view.stored:
                kept.memo.pop(RECALL, None)
        self._changed.notify_all()

    def failed(self, job: Job, error: Exception) -> None:
        """As in `Recalling`."""
        if isinstance(error, CorruptChunk | MissingChunk):
            self.damaged = self._sidecars[job.sidecar]
        self.lose(failure_reason(error))

    def crashed(self, crash: BaseException) -> None:
        """As in `Recalling`."""
        self._crash = crash
        self._end()

    def lose(self, why: str) -> None:
        """As in `Recalling`."""
        if not self.stopped:
            self._lost = why
            self._end()
            self._tell()

    def forked(self) -> None:
        """As in `Recalling`."""
        self._changed = threading.Condition(self._readers.lock)
        self._lost = self._lost or "this process was forked from the one that reads it"
        self.stopped = True

    def _end(self) -> None:
        """Read nothing more."""
        self.stopped = True
        self._readers.close(self)
        self._changed.notify_all()

    def _tell(self) -> None:
        """Say in the report what was read."""
        report = self._report
        if report is not None:
            total = sum(self._bytes)
            report.bytes_by_tier[self._name] += total - self._told
            self._told = total
            report.loads = self._records(self._now())

    def _records(self, ended_s: float) -> list[LoadRecord]:
        outcome = self._lost or ("placed" if not self._missing else "reading")
        return [
            LoadRecord(one.start, one.end - one.start, self._name, self._began_s, ended_s, size, outcome)
            for one, size in zip(self._sidecars, self._bytes, strict=True)
        ]

    # ------------------------------------------------------------------ called by the threads that read

    def read(self, job: Job, reader: ChunkReader) -> memoryview | None:
        """As in `Recalling`: rows that stand next to each other."""
        header = self._beginnings[job.sidecar].header
        begin = header.offsets[self._places[job.batch[0]][1]]
        last = self._places[job.batch[-1]][1]
        data = memoryview(bytearray(header.offsets[last] + header.lengths[last] - begin))
        if reader.size != header.total_bytes:
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"it has {reader.size} bytes, and had {header.total_bytes}")
        reader.announce(begin, begin + len(data))
        read = 0
        try:
            while read < len(data) and not self.stopped:
                count = reader.read_into(data[read : read + reader.slice_bytes], begin + read)
                if not count:
                    raise CorruptChunk(ChunkFault.TRUNCATED, f"it ends at {begin + read} bytes")
                read += count
                job.moved_at = monotonic()
        finally:
            with self._changed:
                self._bytes[job.sidecar] += read
        return data if read == len(data) else None

    def place(self, job: Job, data: memoryview) -> None:
        """As in `Recalling`."""
        import torch

        from cakekv.decode.sidecar import placed

        header = self._beginnings[job.sidecar].header
        begin = header.offsets[self._places[job.batch[0]][1]]
        with torch.inference_mode():
            for place in job.batch:
                segment = self._places[place][1]
                at = header.offsets[segment] - begin
                part = data[at : at + header.lengths[segment]]
                header.verify(segment, part)
                rows = self._rows[place]
                layer = self._layers[rows.layer]
                placed(rows, part, layer.planes)
                layer.missing[rows.head, rows.positions] = False
        with self._changed:
            self._missing.difference_update(job.batch)
