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
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from cakekv.embedded.answering import Piece
from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import LOOK_S, check
from cakekv.embedded.stored import Found
from cakekv.errors import ChunkFault, CorruptChunk, MissingChunk, StoreError
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

_AT_ONCE = 1 << 20
"""Bytes that are read in one go, if the rows stand next to each other."""
_SUFFIX_SPAN = 256
"""Tokens of the suffix that are computed at once, and see the same."""
Place = tuple[int, int]
"""Which sidecar, and which of its segments."""
Again = Callable[["Sidecar | None"], Prefill]


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
    """

    def __init__(self, arms: Arms[Any, Any], stores: Sequence[Store]) -> None:
        self._arms = arms
        self._stores = stores
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
    ) -> Prefill | None:
        """Compute a prompt's suffix over what its queries select; None if that is not to be had.

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
        reading = Reading(self._arms, self._stores[plan.tier], request, plan, beginnings, again, tell)
        self._open.add(reading)
        try:
            prefill = reading.prefill(token_ids, capacity)
        except RecallLost as lost:
            request.notes.append(
                f"What the first token selects could not be read ({lost.reason}), so the prompt was restored whole."
            )
            if reading.damaged is not None:
                beside.distrust(reading.damaged)
            prefill = None
        finally:
            if not reading.has_begun:
                reading.stop()
        if prefill is not None:
            sight = self._arms.options.decode
            assert sight is not None
            self._spread.observe(reading.selected_share, sight.budget, plan.end)
        return prefill

    def close(self) -> None:
        """Read nothing more for anybody."""
        for reading in list(self._open):
            reading.stop()


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
    """What is read of one prompt, by threads of its own.

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
        store: Store,
        request: Request,
        plan: Planned,
        beginnings: Mapping[Sidecar, Beginning],
        again: Again,
        tell: OnProgress | None = None,
    ) -> None:
        self._arms, self._store, self._request, self._plan = arms, store, request, plan
        self._sidecars, self._beginnings = list(beginnings), list(beginnings.values())
        self._places: list[Place] = []
        self._rows: list[Rows] = []
        """Of each place."""
        self._groups: list[int] = []
        """Of each place: the number of its group in its head, counted through the prompt; -1 for none."""
        self._view: Any = None
        self._layers: list[_Layer] = []
        self._changed = threading.Condition()
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
        self._reads_rest = self._is_sorted = self._stopped = False
        self._moved_at = monotonic()
        layers = len(arms.engine.layout.layers)
        self._bytes = [one.header.offsets[layers] for one in self._beginnings]
        """Read of each, its beginning included."""
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
        self._ask(first)
        self._hire(min(len(first), self._store.parallel_reads))
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
            self._changed.notify_all()
        return Prefill(token_ids, view, logits, report, recall=self)

    def stop(self) -> None:
        """Read nothing more."""
        with self._changed:
            if not self._stopped:
                self._tell()
            self._stopped = True
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until everything is there; raises `RecallLost` if it will not be."""
        with self._changed:
            self._reads_rest = True
            self._changed.notify_all()
        self._await(range(len(self._places)))

    def _hire(self, wanted: int) -> None:
        """Start threads that read. If the system has fewer to spare, those will do; without any, nothing is read."""
        for number in range(wanted):
            try:
                threading.Thread(target=self._work, name=f"cakekv-recall-{self._store.name}", daemon=True).start()
            except RuntimeError as error:
                if not number:
                    raise RecallLost(f"no thread can be started to read it: {error}") from error
                return

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
            self._ask(places)
            self._await(places)

    def _scored(self, layer: _Layer, scores: torch.Tensor) -> None:
        """As `Recall.scored`."""
        layer.scores = scores

    def _ask(self, places: Iterable[int]) -> None:
        """Have these be read before anything else."""
        with self._changed:
            self._moved_at = monotonic()
            self._wanted = sorted({*self._wanted, *(place for place in places if place not in self._taken)})
            self._changed.notify_all()

    def _await(self, places: Iterable[int]) -> None:
        """Until these are placed, or nothing has come for as long as the deadline says."""
        deadline_s = self._arms.options.deadline_s
        with self._changed:
            while not self._missing.isdisjoint(places):
                check()
                if self._crash is not None:
                    raise self._crash
                if monotonic() - self._moved_at > deadline_s:
                    self._lose("late")
                if self._stopped:
                    raise RecallLost(self._lost or "its answer is over")
                self._changed.wait(LOOK_S)

    def _now(self) -> float:
        return monotonic() - self._request.arrived_s

    # ------------------------------------------------------------------ called with the lock held

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

    def _next(self) -> list[int] | None:
        """What to read next, in one go; None: nothing any more."""
        while not self._stopped and self._missing:
            if self._wanted:
                batch = self._adjacent(self._wanted)
                self._wanted = self._wanted[len(batch) :]
                return batch
            if self._reads_rest and not self._is_sorted:
                self._sort()
            while self._reads_rest and self._order:
                left = [place for place in self._unread[self._order[0]] if place not in self._taken]
                if left:
                    return self._adjacent(left)
                self._order.pop(0)
            self._changed.wait()
        return None

    def _adjacent(self, places: Sequence[int]) -> list[int]:
        """The first of these, with those behind it as far as their bytes are next to each other."""
        batch, size = [places[0]], self._size(places[0])
        for place in places[1:]:
            size += self._size(place)
            (sidecar, segment), (before, last) = self._places[place], self._places[batch[-1]]
            if sidecar != before or segment != last + 1 or size > _AT_ONCE:
                break
            batch.append(place)
        self._taken.update(batch)
        return batch

    def _size(self, place: int) -> int:
        sidecar, segment = self._places[place]
        return self._beginnings[sidecar].header.lengths[segment]

    def _lose(self, why: str) -> None:
        self._lost, self._stopped = self._lost or why, True
        self._changed.notify_all()

    def _tell(self) -> None:
        """Say in the report what was read."""
        report = self._report
        if report is not None:
            name, ended = self._arms.tiers[self._plan.tier].name, self._now()
            report.bytes_by_tier[name] = sum(self._bytes)
            outcome = self._lost or ("placed" if not self._missing else "reading")
            report.loads = [
                LoadRecord(one.start, one.end - one.start, name, self._began_s, ended, size, outcome)
                for one, size in zip(self._sidecars, self._bytes, strict=True)
            ]

    # ------------------------------------------------------------------ the threads that read

    def _work(self) -> None:
        readers: dict[int, ChunkReader] = {}
        with ExitStack() as stack:
            while True:
                with self._changed:
                    batch = self._next()
                if batch is None:
                    return
                sidecar = self._places[batch[0]][0]
                try:
                    if sidecar not in readers:
                        readers[sidecar] = stack.enter_context(self._store.open(self._sidecars[sidecar].key))
                    self._read(readers[sidecar], sidecar, batch)
                except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
                    with self._changed:
                        if isinstance(error, CorruptChunk | MissingChunk):
                            self.damaged = self._sidecars[sidecar]
                        self._lose(failure_reason(error))
                        self._tell()
                except BaseException as crash:
                    with self._changed:
                        self._crash = crash
                        self._changed.notify_all()
                    return

    def _read(self, reader: ChunkReader, sidecar: int, batch: Sequence[int]) -> None:
        """Read rows that stand next to each other, verify them, and put them where they belong."""
        import torch

        from cakekv.decode.groups import RECALL
        from cakekv.decode.sidecar import placed

        header = self._beginnings[sidecar].header
        segments = [self._places[place][1] for place in batch]
        begin = header.offsets[segments[0]]
        data = memoryview(bytearray(header.offsets[segments[-1]] + header.lengths[segments[-1]] - begin))
        if reader.size != header.total_bytes:
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"it has {reader.size} bytes, and had {header.total_bytes}")
        reader.announce(begin, begin + len(data))
        read = 0
        while read < len(data) and not self._stopped:
            count = reader.read_into(data[read : read + reader.slice_bytes], begin + read)
            if not count:
                raise CorruptChunk(ChunkFault.TRUNCATED, f"it ends at {begin + read} bytes")
            read += count
        with self._changed:
            self._bytes[sidecar] += read
        if read < len(data):
            return
        with torch.inference_mode():
            for place, segment in zip(batch, segments, strict=True):
                at = header.offsets[segment] - begin
                part = data[at : at + header.lengths[segment]]
                header.verify(segment, part)
                rows = self._rows[place]
                layer = self._layers[rows.layer]
                placed(rows, part, layer.planes)
                layer.missing[rows.head, rows.positions] = False
        with self._changed:
            self._missing.difference_update(batch)
            self._moved_at = monotonic()
            if not self._missing:
                self._tell()
                for kept in self._view.stored:
                    kept.memo.pop(RECALL, None)
            self._changed.notify_all()
