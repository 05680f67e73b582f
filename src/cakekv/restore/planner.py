"""The heart: decides what one restore computes and loads next.

Pure: told events with timestamps, it answers with decisions. How drivers talk to it is in `protocol`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.restore.costs import ComputeModel
from cakekv.restore.coverage import Coverage, State
from cakekv.restore.explanation import PlannedRun, planned_runs
from cakekv.restore.flights import Flights, Load, Tier
from cakekv.restore.front import Front, Span
from cakekv.restore.layered_finish import LayeredFinish, Phase, Piece
from cakekv.restore.level_choice import RESERVE, Level
from cakekv.restore.options import MODES, Mode, PlannerOptions
from cakekv.restore.protocol import Wait
from cakekv.restore.report import FrontierPoint, Recorder, RestoreReport
from cakekv.restore.schedule import Schedule
from cakekv.restore.situation import Moment, Situation

__all__ = ["MODES", "Mode", "Planner", "PlannerOptions", "Span", "Wait"]

_DEFAULT = PlannerOptions()
_LONGEST_SUFFIX_SPANS = 4
"""A suffix of up to so many full spans is computed in one, if that lets loads go on meanwhile."""
_LOOK_S = 0.005
"""While pieces are being placed, compute asks again after so many seconds."""
_PLANNED_EVERY_S = 0.01
"""While compute only waits, plan no more often: loads end in quick succession, and nothing else goes on meanwhile."""


class Planner:
    """Decides how one prompt gets from tokens and stored chunks to a complete KV cache.

    Parameters
    ----------
    prompt_tokens : int
        Length of the prompt. Its last token is always computed, since its logits are needed.
    chunk_tokens : int
        Tokens per chunk.
    stored : sequence of sequences of int
        Per chunk, from the first, the indices of the tiers that hold it; chunks past the end of it are not stored.
    tiers : sequence of Tier
        The tiers.
    compute : ComputeModel
        What spans cost; learns from this restore.
    levels : sequence of Level
        The ways to read chunks, the coarsest first: of fewer bytes, and less exact (see `level_choice`). One will do.
    options : PlannerOptions
        What it may do, and until when.
    covered_tokens : int
        Positions at the front that are in the cache already.
    starts : sequence of int or None
        First position of every chunk, if they are not the multiples of `chunk_tokens`; none is longer than that.
    now : float
        Seconds on the driver's clock.

    Raises
    ------
    ValueError
        Lengths or positions contradict each other.
    """

    def __init__(
        self,
        prompt_tokens: int,
        chunk_tokens: int,
        stored: Sequence[Sequence[int]],
        tiers: Sequence[Tier],
        compute: ComputeModel,
        levels: Sequence[Level],
        options: PlannerOptions = _DEFAULT,
        *,
        covered_tokens: int = 0,
        starts: Sequence[int] | None = None,
        now: float = 0.0,
    ) -> None:
        if not 0 <= covered_tokens < prompt_tokens:
            raise ValueError(f"at least one token is left to compute: {covered_tokens=}, {prompt_tokens=}")
        if prompt_tokens < 1 or chunk_tokens < 1:
            raise ValueError(f"lengths must be positive: {prompt_tokens=}, {chunk_tokens=}")
        if not levels:
            raise ValueError("there is no way to read a chunk: give at least one level")
        self.prompt_tokens = prompt_tokens
        self.chunk_tokens = chunk_tokens
        self.mode = options.mode
        self.coverage = Coverage(prompt_tokens, chunk_tokens, stored, options.window, starts)
        tiers = tuple(tiers)
        self._flights = Flights(tiers, options.deadline_s)
        self._situation = Situation(self.coverage, self._flights, tiers, compute, options)
        self._front = Front(self._situation, covered_tokens)
        self._schedule = Schedule(self._situation, levels, now + options.ttft_target_s * (1 - RESERVE))
        self._suffix = self._back = self.coverage.suffix
        self.prefix_tokens = self.coverage.start_of(self._suffix)
        report = RestoreReport(self.mode, prompt_tokens, chunk_tokens, prefix_tokens=self.prefix_tokens)
        self._record = Recorder(report, [tier.name for tier in tiers], levels[-1].chunk_bytes / chunk_tokens, now)
        self._record.frontier(now, 0, self.prefix_tokens)
        can_wait = (
            self.mode in ("auto", "both")
            and not self.coverage.last_alone  # a load could overwrite the last token's row, and it takes no time
            and not self._schedule.chooses_level  # of pieces it could not be changed any more
            and 0 < prompt_tokens - self.prefix_tokens <= _LONGEST_SUFFIX_SPANS * self._situation.max_span_tokens
        )
        groups = levels[-1].groups if can_wait else None
        self._finish = LayeredFinish(self._situation, self._schedule, self._front, self._record, groups)

    def report(self) -> RestoreReport:
        """What has happened so far: always the same object, brought up to date."""
        return self._record.finish(self.coverage)

    @property
    def latest(self) -> FrontierPoint:
        """Where both arms stand."""
        return self._record.report.frontiers[-1]

    @property
    def done(self) -> bool:
        """Whether every position is covered."""
        return self.coverage.front == self.coverage.chunks

    def explain(self, now: float) -> list[PlannedRun]:
        """What would be done with everything that is not covered yet, as far as is known now."""
        self._replan(now)
        return planned_runs(self._situation, self._schedule.plan.assigned, self._schedule.level.chunk_bytes)

    # ------------------------------------------------------------------ compute

    def next_compute(self, now: float) -> Span | Wait | None:
        """What to compute next: a span (which is claimed), a wait for a load, or None when all is covered."""
        assert self._front.span is None, "the span before was not reported as computed"
        self.check_late(now)
        if self._finish.phase is Phase.IN_PIECES:
            return self._begin_suffix(now)
        if self._finish.phase is Phase.BROKEN:
            if self.placing:
                return Wait(now + _LOOK_S)
            self._finish.disband()
        while not self.done:
            first = self.coverage.front
            count = self._computable(first, now)
            if count == 0:
                if self._finish.begin(now):
                    return self._begin_suffix(now)
                return Wait(self._flights.next_look(now))
            taken_back = self.coverage.take_back_unwindowed(first)
            if not taken_back:
                span = self._front.begin_chunks(first, self._schedule.span_chunks(first, count), now)
                self._finish.begin(now)
                return span
            level, coverage = self._schedule.level, self.coverage
            size = sum(coverage.share_of(level.unwindowed_chunk_bytes, chunk) for chunk in taken_back)
            self._record.taken_back(sum(coverage.tokens[chunk] for chunk in taken_back), size)
            self._schedule.invalidate()
        return None

    @property
    def position(self) -> int:
        """The first position that is not covered, or to the end of the span that was claimed."""
        return self._front.position

    def computed(self, span: Span, now: float, waited_s: float = 0.0, typical: bool = True) -> None:
        """The claimed span is in the cache; its layers waited for loads for `waited_s` seconds in all.

        Nothing is learned from it unless it is `typical`: if more was computed with it.
        """
        if span.layered:
            self._finish.end()
        began, end = self._front.covered(span), span.start + span.tokens
        if typical:
            self._situation.compute.observe(span.start, span.tokens, now - began - waited_s)
        self._schedule.changed_hands(self.coverage.chunk_at(end) - self.coverage.chunk_at(span.start) + 1)
        self._record.span(span.start, span.tokens, began, now)
        self._record.frontier(now, end, self.coverage.start_of(self._back))

    def _computable(self, first: int, now: float) -> int:
        """How many chunks from `first` on compute should take, by a plan that is good for so many."""
        count = self._schedule.computable(first)
        waits = count == 0 and now < self._schedule.made_at + _PLANNED_EVERY_S
        if self._schedule.stale or not (self._schedule.fills_two_spans(first, count) or waits):
            self._replan(now)
            count = self._schedule.computable(first)
        return count

    def _begin_suffix(self, now: float) -> Span:
        """Claim the suffix although chunks before it still arrive."""
        return self._front.begin_chunks(self._suffix, self.coverage.chunks - self._suffix, now, layered=True)

    # ----------------------------------------------------------- layered finish

    @property
    def layered_allowed(self) -> bool:
        """Whether the driver could have the suffix's layers wait for loads now."""
        return self._finish.allowed

    @layered_allowed.setter
    def layered_allowed(self, allowed: bool) -> None:
        self._finish.allowed = allowed

    @property
    def placing(self) -> int:
        """Pieces that are being placed."""
        return self._finish.placing

    def layer_ready(self, group: int) -> bool:
        """Whether the layered span that was claimed may go through this group of layers."""
        return self._finish.ready(group)

    @property
    def lost(self) -> bool:
        """Whether the layered span that was claimed waits for something that will not come."""
        return self._finish.phase is Phase.BROKEN

    def gave_up(self, span: Span, now: float) -> None:
        """The layered span was given up, because a load it needs is `lost`: its positions are uncovered again."""
        self._finish.disband()
        self._record.gave_up(self._front.gave_up(span), now)

    # -------------------------------------------------------------------- loads

    def next_load(self, tier: int, now: float, ahead: int = 0) -> Load | None:
        """What `tier` should load next, or None if there is nothing worth loading now (ask after the next event).

        `ahead` loads may queue at the tier beside those that it serves at a time.
        """
        if self.mode == "compute" or not self._flights.has_room(tier, self._schedule.level.chunk_bytes, ahead):
            return None
        if self._finish.phase is not Phase.WHOLE:
            piece = self._finish.next_piece(tier)
            return self._begin_load(piece, tier, now, ahead) if piece else None
        if self._schedule.stale:
            self._replan(now)
        chunk = self._schedule.next_chunk(tier, ahead > 0)
        if chunk is None and self._schedule.changed:
            self._replan(now)
            chunk = self._schedule.next_chunk(tier, ahead > 0)
        if chunk is None:
            return None
        self.coverage.loading(chunk)
        return self._begin_load(Piece(chunk), tier, now, ahead)

    def _begin_load(self, piece: Piece, tier: int, now: float, ahead: int) -> Load:
        chunk, group, size = piece
        windowed = self.coverage.needs_window(chunk)
        coverage, level = self.coverage, self._schedule.level
        if size is None:
            size = coverage.share_of(level.chunk_bytes if windowed else level.unwindowed_chunk_bytes, chunk)
        start, tokens = coverage.start_of(chunk), coverage.load_tokens(chunk)
        load = Load(chunk, start, tokens, tier, windowed, size, now, group, level.parts)
        self._flights.begin(load, may_queue=ahead > 0)
        self._schedule.changed_hands(1)
        return load

    def arrived(self, load: Load, now: float) -> bool:
        """All bytes of the load are in staging and verified. Returns whether to place them (then call `placed`)."""
        self._answered(load, load.size, now)
        if load.cancelled:
            self._note(load, load.size, now, load.why_cancelled)
            return False
        self._flights.land(load)
        if load.group is None and self._finish.phase is Phase.WHOLE and self._schedule.cuts_a_span(load.chunk):
            self.coverage.give_back(load.chunk)
            self._note(load, load.size, now, load.why_cancelled)
            return False
        if load.group is None:
            self.coverage.placing(load.chunk)
        else:
            self._finish.placing += 1
        return True

    def placed(self, load: Load, now: float) -> None:
        """The load is in the cache."""
        complete = self._finish.placed(load)
        if complete and load.group is not None:
            self.coverage.placing(load.chunk)
        if complete:
            self.coverage.loaded(load.chunk, load.windowed)
        self._note(load, load.size, now, "placed", self.coverage.tokens[load.chunk] if complete else 0)

    def abandoned(self, load: Load, size: int, now: float) -> None:
        """A cancelled load was given up after `size` bytes."""
        assert load.cancelled
        self._answered(load, size, now)
        self._note(load, size, now, load.why_cancelled)

    def failed(self, load: Load, reason: str, size: int, now: float, silent: bool = False) -> None:
        """The load failed after `size` bytes; another tier is tried, or the chunk becomes a hole.

        `silent` means that the tier did not answer. If it delivered nothing else meanwhile, nothing more is loaded from
        it: every chunk would be waited for as long as this one.
        """
        hangs = silent and self._flights.nothing_since(load)
        self._answered(load, size, now)
        self._note(load, size, now, reason)
        if not load.cancelled:
            self._flights.land(load)
            self._lose(load, reason)
        if hangs:
            self._give_up(load.tier, reason)

    def check_late(self, now: float) -> None:
        """Give up loads that took too long. A chunk is loaded once more if its tier still delivers others."""
        for load in self._flights.give_up_late(now):
            again = load.chunk not in self.coverage.late and not self._flights.stalled(load.tier)
            self.coverage.late.add(load.chunk)
            self._lose(load, "late", again)
        self._finish.check_stalled()

    def _give_up(self, tier: int, reason: str) -> None:
        """Load nothing more from a tier, and stop waiting for what it was to deliver."""
        for load in self._flights.give_up(tier):
            self.coverage.late.add(load.chunk)
            self._lose(load, "late")
        for chunk in self.coverage.drop_tier(tier):
            self._record.lost(self.coverage.start_of(chunk), reason)
        self._schedule.invalidate()

    def cancel_loads(self) -> None:
        """Flag every load in flight as cancelled: the restore is being given up."""
        self._flights.cancel_all()

    def _answered(self, load: Load, size: int, now: float) -> None:
        if self._flights.answered(load, size, now):
            self._schedule.invalidate()

    def _note(self, load: Load, size: int, now: float, outcome: str, tokens: int = 0) -> None:
        self._record.load(load, size, now, outcome, tokens)
        state = self.coverage.state
        while self._back > 0 and state[self._back - 1] in (State.LOADED, State.MISSING):
            self._back -= 1
        self._record.frontier(now, self.latest.front, self.coverage.start_of(self._back))

    def _lose(self, load: Load, reason: str, again: bool = False) -> None:
        """Stop waiting for this load. Its tier is never asked for the chunk again, unless `again`."""
        self._finish.break_off()
        if again:
            self.coverage.give_back(load.chunk)
        else:
            self.coverage.drop_holder(load.chunk, load.tier)
        self._record.lost(load.start, reason)
        self._schedule.invalidate()

    def _replan(self, now: float) -> None:
        """Decide again which chunks to load."""
        self._schedule.update(Moment(now, self._front.busy_s(now), self._finish.seconds()))
