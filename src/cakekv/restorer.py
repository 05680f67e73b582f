"""One prompt's restore on an embedded engine: the planner decides, the engine computes, the loader loads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Generic, NamedTuple

from cakekv.chunk import ChunkShape
from cakekv.engine.base import Cache, Engine, Logits
from cakekv.keys import ChunkKey
from cakekv.load.loader import Loader, load_bytes
from cakekv.load.staging import StagingPool
from cakekv.restore.costs import ComputeCost
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.flights import Source
from cakekv.restore.layered import LayerGroups
from cakekv.restore.planner import Mode, Restore, Span, Wait
from cakekv.restore.report import RestoreReport
from cakekv.store.base import Store


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

_LOOK_S = 0.2
"""Seconds after which a layer that waits looks for loads that are late."""
_MOST_GROUPS = 16
_LEAST_READ_BYTES = 1 << 16
"""A group of layers is at least that much of a chunk, so that reading it in pieces costs little."""


class _LoadLost(Exception):
    """A load that a layered span waits for will not come."""


class Restorer(Generic[Cache, Logits]):
    """Fills one cache with one prompt.

    Parameters
    ----------
    engine : Engine
        The model.
    cache : Cache
        A fresh cache of the engine, with room for the prompt.
    token_ids : sequence of int
        The prompt.
    keys : sequence of ChunkKey
        Keys of its full chunks.
    stored : sequence of sequences of int
        Per chunk, which of the tiers hold it.
    tiers : sequence of Store
        Where to load from.
    sources : sequence of Source
        The planner's view of the tiers, in the same order.
    compute_cost : ComputeCost
        What spans cost; learns.
    shape : ChunkShape
        What a chunk looks like.
    staging : StagingPool
        Buffers for the loader.
    mode, max_span_tokens
        As in `Restore`.
    layered_finish : bool
        Whether the suffix may be computed while the last chunks before it arrive, layer by layer.
    began : float
        `time.monotonic()` at which the request began.
    on_span : callable
        (restorer, span) Told of every computed span, in order.
    on_progress : callable or None
        Told of every change, from several threads.
    """

    def __init__(
        self,
        engine: Engine[Cache, Logits],
        cache: Cache,
        token_ids: Sequence[int],
        keys: Sequence[ChunkKey],
        stored: Sequence[Sequence[int]],
        tiers: Sequence[Store],
        sources: Sequence[Source],
        compute_cost: ComputeCost,
        shape: ChunkShape,
        staging: StagingPool,
        *,
        mode: Mode,
        max_span_tokens: int,
        layered_finish: bool = True,
        began: float,
        on_span: Callable[[Restorer[Cache, Logits], Span], None] = lambda restorer, span: None,
        on_progress: OnProgress | None = None,
    ) -> None:
        unwindowed = engine.layout.unwindowed
        everything = range(len(engine.layout.layers))
        self._groups = layer_groups(shape) if layered_finish else []
        self._group_of = [number for number, group in enumerate(self._groups) for _ in group]
        self._engine = engine
        self._cache = cache
        self._token_ids = token_ids
        self._began = began
        self._on_span = on_span
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._restore = Restore(
            len(token_ids),
            shape.tokens,
            stored,
            sources,
            compute_cost,
            chunk_bytes=load_bytes(shape, everything),
            unwindowed_chunk_bytes=load_bytes(shape, unwindowed),
            window=engine.layout.window,
            groups=_group_bytes(shape, self._groups, unwindowed) if len(self._groups) > 1 else None,
            mode=mode,
            max_span_tokens=max_span_tokens,
            now=began,
        )
        self._loader = Loader(
            self._restore,
            self._changed,
            tiers if any(stored) else [],
            keys,
            shape,
            unwindowed,
            self._groups,
            lambda start, tokens, parts: engine.place(cache, start, tokens, parts),
            staging,
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
        with self._loader:
            while True:
                with self._changed:
                    self._loader.raise_crash()
                    answer = self._restore.next_compute(monotonic())
                    self._changed.notify_all()
                    if isinstance(answer, Wait):
                        self._changed.wait(max(0.0, answer.until - monotonic()))
                        continue
                if answer is None:
                    assert logits is not None, "the last position is always computed"
                    return logits
                logits = self._compute(answer)

    def _compute(self, span: Span) -> Logits | None:
        """Compute a span; None if it had to be given up."""
        token_ids = self._token_ids[span.start : span.start + span.tokens]
        self._waited_s = 0.0
        try:
            logits = self._engine.compute(self._cache, token_ids, span.start, self._gate if span.layered else None)
        except _LoadLost:
            with self._changed:
                self._changed.wait_for(lambda: not self._restore.placing)
                self._restore.gave_up(span, monotonic())
            return None
        with self._changed:
            self._restore.computed(span, monotonic(), self._waited_s)
            self._tell()
            self._changed.notify_all()
        self._on_span(self, span)
        return logits

    def _gate(self, layer: int) -> None:
        """Wait until what `layer` sees before the suffix is in place."""
        group = self._group_of[layer]
        with self._changed:
            while not self._restore.layer_ready(group):
                self._loader.raise_crash()
                now = monotonic()
                self._restore.check_late(now)
                if self._restore.lost:
                    raise _LoadLost
                self._changed.wait(_LOOK_S)
                self._waited_s += monotonic() - now

    def explain(self) -> list[PlannedRun]:
        """The plan as it stands."""
        with self._changed:
            return self._restore.explain(monotonic())

    def is_missing(self, chunk: int) -> bool:
        """Whether no tier can deliver the chunk: it was not stored, or its loads failed."""
        return not self._restore.coverage.holders[chunk]

    def report(self) -> RestoreReport:
        """What happened; complete once `run` has returned (abandoned loads are given a moment to stop)."""
        self._loader.join(timeout_s=1.0)
        with self._changed:
            report = self._restore.report
            report.placed_bytes = self._loader.placed_bytes
            return report

    def release(self) -> None:
        """Let go of the cache, which loader and restorer, referring to each other, would keep for a while."""
        del self._cache, self._on_span
        self._loader.release()

    def _tell(self) -> None:
        """Report progress; called with `_changed` held."""
        if self._on_progress is None:
            return
        restore = self._restore
        latest = restore.latest
        self._on_progress(
            Progress(
                restore.mode,
                restore.prompt_tokens,
                restore.prefix_tokens,
                latest.front,
                latest.back,
                restore.coverage.bands(),
                monotonic() - self._began,
            )
        )


def layer_groups(shape: ChunkShape) -> list[range]:
    """Cut a chunk's layers into groups of about the same size, for a layered finish."""
    layers = len(shape.segment_bytes)
    number = max(1, min(_MOST_GROUPS, layers, sum(shape.segment_bytes) // _LEAST_READ_BYTES))
    ends = [layers * (group + 1) // number for group in range(number)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _group_bytes(shape: ChunkShape, groups: Sequence[range], unwindowed: Sequence[int]) -> LayerGroups:
    """Bytes to read per group; the first one of a chunk brings the header, too."""
    whole = [load_bytes(shape, group, with_header=not number) for number, group in enumerate(groups)]
    needed = [[layer for layer in group if layer in unwindowed] for group in groups]
    part = [load_bytes(shape, layers, with_header=not number) if layers else 0 for number, layers in enumerate(needed)]
    return LayerGroups(tuple(whole), tuple(part))
