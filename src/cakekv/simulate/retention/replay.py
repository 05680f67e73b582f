"""One policy at one capacity: every request is looked up, restored with what is there, and saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cakekv.simulate.cluster.trace import Arrival
from cakekv.simulate.retention.store import Retained, key_of
from cakekv.simulate.retention.timing import Timer

_STEP_S = 1e-6
"""Between two operations of one request, so that their order shows in the times."""


class Result(NamedTuple):
    """What a store was worth. All sums over the requests."""

    computed_s: float
    """TTFT if nothing were ever stored."""
    saved_s: float
    """By how much it was less."""
    chunks: int
    """Whole chunks asked for."""
    found: int
    """Those of them that were stored."""
    loaded: int
    """Those of them that were loaded; compute was there first at the others."""
    written: int
    declined: int


class Case(NamedTuple):
    """One restore, to look at again."""

    prompt_tokens: int
    stored: Sequence[bool]
    seconds: float


def replay(
    store: Retained, timer: Timer, requests: Sequence[Arrival], keep_every: int = 0
) -> tuple[Result, list[Case]]:
    """Serve requests one by one, without waiting times: TTFT is what the restore takes on an idle machine.

    Parameters
    ----------
    store : Retained
        Empty.
    timer : Timer
        Its chunks are the trace's blocks.
    requests : sequence of Arrival
        In order of arrival.
    keep_every : int
        Of the restores in which something was stored, one in so many is kept as a case; 0 for none.
    """
    computed_s = saved_s = 0.0
    chunks = found = loaded = written = declined = 0
    cases: list[Case] = []
    restores = 0
    for request in requests:
        keys = [key_of(block) for block in request.blocks]
        held = store.holds(keys, request.arrived_s)
        timing = timer.restored(request.prompt_tokens, held)
        alone_s = timer.computed(request.prompt_tokens)
        computed_s += alone_s
        saved_s += alone_s - timing.seconds
        usable = timer.whole_chunks(request.prompt_tokens)
        chunks += usable
        found += sum(held[:usable])
        loaded += len(timing.loads)
        now = request.arrived_s
        for chunk in timing.loads:
            now += _STEP_S
            store.read(keys[chunk], now)
        for chunk, key in enumerate(keys):
            if not held[chunk]:
                now += _STEP_S
                kept = store.write(key, chunk * timer.chunk_tokens, now)
                written += kept
                declined += not kept
        if keep_every and any(held[:usable]):
            restores += 1
            if restores % keep_every == 0:
                cases.append(Case(request.prompt_tokens, held, timing.seconds))
    return Result(computed_s, saved_s, chunks, found, loaded, written, declined), cases
