"""One prompt's restore on an embedded engine: the planner decides, the engine computes, the loader loads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import get_ident
from time import monotonic
from typing import Generic, NamedTuple, Self

from cakekv.codec.coder import ChunkCoder
from cakekv.embedded.arbiter import Arbiter, Request
from cakekv.embedded.executor import LOOK_S, check
from cakekv.embedded.loader import Loader, Loading
from cakekv.engine.base import Cache, Engine, Logits
from cakekv.keys import ChunkKey
from cakekv.load.pieces import layer_groups, levels_of
from cakekv.load.staging import StagingPool
from cakekv.restore.contention import Burden, SharedCompute, SharedLoad
from cakekv.restore.costs import ComputeCost, LoadCost
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.flights import Tier
from cakekv.restore.planner import Mode, Planner, PlannerOptions, Span, Wait
from cakekv.restore.priority import Policy, RequestState
from cakekv.restore.report import RestoreReport
from cakekv.store.base import Store, distinct_names


class Progress(NamedTuple):
    """A restore at one moment."""

    mode: str
    prompt_tokens: int
    prefix_tokens: int
    front: int
    """End of the last computed span."""
    back: int
    """Start of the loaded tail."""
    bands: list[tuple[int, int, str]]
    """Runs of positions (start, end, state), state being the name of a `restore.planner.State` in lower case."""
    elapsed_s: float


OnProgress = Callable[[Progress], None]

_LAST_LOADS_S = 0.3
"""Seconds that loads which were given up have to end, to be in the report. A tier that hangs costs them, too."""
_LONGEST_WAIT_S = 3600.0
"""After this long, whoever waits for a load looks again, however patient the deadline is."""


class _LoadLost(Exception):
    """A load that a layered span waits for will not come."""


@dataclass(frozen=True)
class Arms(Generic[Cache, Logits]):
    """What all restores of a model share: both arms, and what they cost.

    Attributes
    ----------
    engine : Engine
        The model.
    arbiter : Arbiter
        Whose turn it is; its lock guards the costs.
    loader : Loader
        Loads from the tiers.
    coder : ChunkCoder
        What a chunk looks like, and how it is decoded.
    groups : list of range
        The layers of each group of a layered finish; at most one for none.
    compute_cost : ComputeCost
        What spans cost; learns.
    sources : list of Tier
        The planner's view of the tiers.
    max_span_tokens, deadline_s
        As in `PlannerOptions`.
    """

    engine: Engine[Cache, Logits]
    arbiter: Arbiter
    loader: Loader
    coder: ChunkCoder
    groups: list[range]
    compute_cost: ComputeCost
    sources: list[Tier]
    max_span_tokens: int
    deadline_s: float

    @classmethod
    def of(
        cls,
        engine: Engine[Cache, Logits],
        policy: Policy,
        compute_cost: ComputeCost,
        tiers: Sequence[Store],
        load_costs: Sequence[LoadCost],
        coder: ChunkCoder,
        staging: StagingPool,
        *,
        max_span_tokens: int,
        layered_finish: bool,
        deadline_s: float,
    ) -> Self:
        """Make what is missing; `load_costs` are those of `tiers`, `staging` has buffers for exact chunks."""
        arbiter = Arbiter(policy)
        groups = layer_groups(coder.expected([]), coder.layers) if layered_finish else []
        loader = Loader(arbiter, tiers, coder, engine.layout.unwindowed, groups, staging, engine.decoder(coder))
        names = distinct_names(tiers)
        sources = [
            Tier(name, cost, tier.parallel_reads) for name, tier, cost in zip(names, tiers, load_costs, strict=True)
        ]
        return cls(engine, arbiter, loader, coder, groups, compute_cost, sources, max_span_tokens, deadline_s)

    def hangs(self, source: int) -> bool:
        """Whether a tier does not answer any more."""
        with self.arbiter.lock:
            return self.loader.hangs(source)


class Restorer(Generic[Cache, Logits]):
    """Fills one cache with one prompt, taking turns with the other open requests.

    Parameters
    ----------
    arms : Arms
        The model, and where to load from.
    request : Request
        Whose prompt it is.
    cache : Cache
        A fresh cache of the engine, with room for the prompt.
    token_ids : sequence of int
        The prompt.
    keys : sequence of ChunkKey
        Keys of its full chunks.
    stored : sequence of sequences of int
        Per chunk, which of the sources hold it.
    sizes : sequence of int
        Bytes of the stored chunks, to plan with.
    mode : str
        As in `PlannerOptions`.
    ttft_target_s : float
        As in `PlannerOptions`.
    quality_floor : int
        The fewest parts of a coded chunk that are read.
    on_span : callable
        (restorer, span) Told of every computed span, in order, while it is this request's turn.
    on_progress : callable or None
        Told of every change, from several threads.
    """

    def __init__(
        self,
        arms: Arms[Cache, Logits],
        request: Request,
        cache: Cache,
        token_ids: Sequence[int],
        keys: Sequence[ChunkKey],
        stored: Sequence[Sequence[int]],
        *,
        sizes: Sequence[int] = (),
        mode: Mode,
        ttft_target_s: float = math.inf,
        quality_floor: int = 1,
        on_span: Callable[[Restorer[Cache, Logits], Span], None] = lambda restorer, span: None,
        on_progress: OnProgress | None = None,
    ) -> None:
        engine, coder, shape = arms.engine, arms.coder, arms.coder.expected(sizes)
        levels = levels_of(coder, shape, engine.layout.unwindowed, arms.groups, quality_floor)
        chunk_bytes = levels[-1].chunk_bytes
        self._arms = arms
        self._arbiter = arms.arbiter
        self._request = request
        self._group_of = [number for number, group in enumerate(arms.groups) for _ in group]
        self._cache = cache
        self._token_ids = token_ids
        self._on_span = on_span
        self._on_progress = on_progress
        self._loads = any(stored) and mode != "compute"
        self._chunk_bytes = chunk_bytes
        self._compute_cost = SharedCompute(arms.compute_cost)
        self._load_costs = [SharedLoad(source.cost) for source in arms.sources]
        for load_cost in self._load_costs:
            load_cost.doubt(chunk_bytes, arms.compute_cost.seconds(0, len(token_ids)))
        self._restore = Planner(
            len(token_ids),
            shape.tokens,
            stored,
            [source._replace(cost=cost) for source, cost in zip(arms.sources, self._load_costs, strict=True)],
            self._compute_cost,
            levels,
            PlannerOptions(
                mode=mode,
                max_span_tokens=arms.max_span_tokens,
                window=engine.layout.window,
                ttft_target_s=ttft_target_s,
                deadline_s=arms.deadline_s,
            ),
            now=request.arrived_s,
        )
        self._loading = Loading(
            request,
            self._restore,
            keys,
            lambda start, tokens, parts: engine.place(cache, start, tokens, parts),
            self._tell,
        )

    def run(self) -> Logits:
        """Cover every position; returns the logits of the prompt's last token.

        Raises
        ------
        BaseException
            Whatever the engine or a loader thread raised; the loads in flight are cancelled first.
        """
        logits: Logits | None = None
        request, arbiter, loader = self._request, self._arbiter, self._arms.loader
        request.describe, request.on_burden = self._describe, self._bear
        try:
            with arbiter.lock:
                arbiter.open(request)
                if self._loads:
                    loader.open(self._loading)
            while True:
                check()
                with arbiter.lock:
                    arbiter.take(request)
                    self._loading.raise_crash()
                    arbiter.weigh(monotonic())
                    answer = self._restore.next_compute(monotonic())
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
        return logits

    def _end(self) -> None:
        with self._arbiter.lock:
            try:
                self._arms.loader.close(self._loading)
            finally:
                self._arbiter.close(self._request)

    def _compute(self, span: Span) -> Logits | None:
        """Compute a span; None if it had to be given up."""
        token_ids = self._token_ids[span.start : span.start + span.tokens]
        self._waited_s = 0.0
        try:
            logits = self._arms.engine.compute(self._cache, token_ids, span.start, self._gate if span.layered else None)
        except _LoadLost:
            with self._arbiter.lock:
                self._request.woken.wait_for(lambda: not self._restore.placing or self._loading.crash is not None)
                self._loading.raise_crash()
                self._restore.gave_up(span, monotonic())
            return None
        with self._arbiter.lock:
            self._restore.computed(span, monotonic(), self._waited_s)
            chunk_tokens = self._arms.coder.exact.tokens
            for chunk in range(span.start // chunk_tokens, (span.start + span.tokens) // chunk_tokens):
                self._loading.parts.pop(chunk, None)
            self._tell()
            self._arms.loader.wake()
        check()  # who was interrupted may have changed the model since
        self._on_span(self, span)
        return logits

    def _gate(self, layer: int) -> None:
        """Wait until what `layer` sees before the suffix is in place; others may compute meanwhile."""
        check()
        group = self._group_of[layer]
        with self._arbiter.lock:
            if self._restore.layer_ready(group):
                return
            began = monotonic()
            self._arbiter.give_back(self._request)
            while not self._restore.layer_ready(group):
                check()
                self._loading.raise_crash()
                self._arms.loader.check_late(monotonic())
                if self._restore.lost:
                    raise _LoadLost
                self._request.woken.wait(LOOK_S)
            self._arbiter.take(self._request)
            self._waited_s += monotonic() - began

    @contextmanager
    def lent(self) -> Iterator[None]:
        """In `on_span`: let others compute during the `with` block."""
        with self._arbiter.lent(self._request):
            yield

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self._restore.prompt_tokens

    def explain(self) -> list[PlannedRun]:
        """The plan as it stands."""
        with self._arbiter.lock:
            return self._restore.explain(monotonic())

    def is_missing(self, chunk: int) -> bool:
        """Whether no tier can deliver the chunk: it was not stored, or its loads failed."""
        return not self._restore.coverage.holders[chunk]

    @cached_property
    def missing_chunks(self) -> int:
        """How many full chunks of the prompt no tier can deliver, as far as was known when this was first asked."""
        full = self.prompt_tokens // self._restore.chunk_tokens
        return sum(not held for held in self._restore.coverage.holders[:full])

    def report(self) -> RestoreReport:
        """What happened; complete once `run` has returned (abandoned loads are given a moment to stop)."""
        with self._arbiter.lock:
            self._loading.join(timeout_s=_LAST_LOADS_S)
            report = self._restore.report()
            report.placed_bytes = self._loading.placed_bytes
            chunk_tokens, codec = self._arms.coder.exact.tokens, self._arms.coder.codec
            chunks = Counter(self._loading.parts.values())
            report.lossy_tokens = (chunks.total() - chunks[0]) * chunk_tokens if codec.lossy else 0
            names = {parts: f"{parts} of {codec.parts}" if parts else "exact" for parts in sorted(chunks)}
            report.level_tokens = {name: chunks[parts] * chunk_tokens for parts, name in names.items()}
            report.after_lossy_tokens = sum(span.tokens for span in report.spans if self.saw_lossy(span.start))
            return report

    def saw_lossy(self, start: int) -> bool:
        """Whether what is computed from `start` on may attend to loaded keys and values that are not exact."""
        first = self._loading.first_lossy
        return first is not None and first * self._arms.coder.exact.tokens < start

    def release(self) -> None:
        """Let go of the cache, which loads and restorer, referring to each other, would keep for a while."""
        del self._cache, self._on_span
        self._loading.release()
        self._request.decode()

    def _describe(self) -> RequestState:
        """What a policy wants to know; called with the lock held."""
        restore, arms = self._restore, self._arms
        coverage = restore.coverage
        tokens = min(len(coverage.uncovered) * coverage.chunk_tokens, restore.prompt_tokens)
        return RequestState.prefill(
            self._request.id,
            self._request.arrived_s,
            tokens,
            stored=self._loads,
            shape=arms.compute_cost.shape,
            span_tokens=arms.max_span_tokens,
            front=coverage.start_of(coverage.front),
            back=restore.latest.back,
            load_s={source: self._token_s(source) for source in coverage.tiers_left()} if self._loads else {},
            prefix_tokens=restore.prefix_tokens,
        )

    def _token_s(self, source: int) -> float:
        cost = self._arms.sources[source].cost
        return cost.seconds(self._chunk_bytes) / self._restore.chunk_tokens

    def _bear(self, burden: Burden) -> None:
        """Plan with what the others leave of either arm; called with the lock held."""
        self._compute_cost.burden = burden.compute
        for source, cost in enumerate(self._load_costs):
            cost.burden = burden.load.get(source, 1.0)
            cost.crowded_s = monotonic()

    def _tell(self) -> None:
        """Report progress; called with the lock held."""
        if self._on_progress is None:
            return
        restore = self._restore
        latest = restore.latest
        self._arbiter.teller = get_ident()
        try:
            self._on_progress(
                Progress(
                    restore.mode,
                    restore.prompt_tokens,
                    restore.prefix_tokens,
                    latest.front,
                    latest.back,
                    restore.coverage.bands(),
                    monotonic() - self._request.arrived_s,
                )
            )
        finally:
            self._arbiter.teller = None
