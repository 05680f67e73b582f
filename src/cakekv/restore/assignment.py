"""The assignment: which of the uncovered chunks to load, given what both arms cost. The rest is computed.

Compute walks the uncovered chunks in order of position. A chunk that nobody stored (a hole, and the suffix) can only
be computed once everything before it is covered; it is a *deadline* for every load before it. Loading a chunk saves
its compute time, and late chunks save most (attention grows with position, bytes do not). So the plan takes the chunks
from the back and gives each to the tier with the most time to spare before the deadlines that follow the chunk,
as long as the load ends before compute would get there. What is left below is computed meanwhile: both arms end
together. With one tier and no hole this is Cake's meeting point (arXiv 2410.03065, section 3), known in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

Candidate = tuple[int, float, Mapping[int, float]]
"""An uncovered chunk: its index, the seconds to compute it, and per tier that could deliver it the seconds that its
load keeps that tier busy; no tier for a hole. If it is in flight, its tier comes first."""


def assign_loads(
    candidates: Sequence[Candidate],
    tiers: int,
    compute_busy_s: float = 0.0,
    finish_s: float = 0.0,
    ends_s: Mapping[int, float] = MappingProxyType({}),
    lag_s: Sequence[float] = (),
) -> dict[int, int]:
    """Choose the chunks to load.

    Parameters
    ----------
    candidates : sequence of Candidate
        All uncovered chunks, by ascending position. The last one is a hole (the suffix is never stored).
    tiers : int
        How many tiers there are.
    compute_busy_s : float
        Seconds until compute is done with what it is doing now.
    finish_s : float
        Seconds that loads before the suffix may go on while the suffix is computed (see `layered_finish`).
    ends_s : mapping of int to float
        For each chunk in flight, the seconds until it should be in place.
    lag_s : sequence of float
        Per tier, the seconds by which loads of chunks due later, in flight beside it, may delay a chunk.

    Returns
    -------
    dict
        Chunk to tier, for the chunks to load.
    """
    before_s = compute_busy_s + sum(candidate[1] for candidate in candidates)
    saved_s = 0.0
    lags = lag_s or [0.0] * tiers
    open_s = float("inf")
    """`saved_s` and the least time before any deadline behind the current chunk."""
    spare_s = [open_s] * tiers
    """The same per tier, less the loads chosen for it."""
    chosen: dict[int, int] = {}
    suffix_passed = False
    for chunk, compute_s, load_s in reversed(candidates):
        before_s -= compute_s
        if not load_s:
            # Loads of chunks behind this hole can wait; only those before it are due when compute gets here.
            due_s = before_s + saved_s + (0.0 if suffix_passed else finish_s)
            open_s = min(open_s, due_s)
            for tier in range(tiers):
                spare_s[tier] = min(spare_s[tier], due_s - lags[tier] if suffix_passed else due_s)
            continue
        suffix_passed = True
        options = iter(load_s.items())
        if ends_s and ends_s.get(chunk, 0.0) > open_s - saved_s:
            next(options)  # the load in flight comes too late
        best, most = -1, saved_s
        for tier, seconds in options:
            left = spare_s[tier] - seconds
            if left > most:
                best, most = tier, left
        if best >= 0:
            chosen[chunk] = best
            spare_s[best] = most
            saved_s += compute_s
    return chosen


def charge_spans(candidates: list[Candidate], fixed_s: float) -> list[Candidate]:
    """Charge every run of holes with the fixed cost of the span it takes, and close gaps that are not worth two spans.

    Parameters
    ----------
    candidates : list of (chunk, compute_s, load_s)
        As for `assign_loads`.
    fixed_s : float
        Seconds that a span costs besides its chunks.

    Returns
    -------
    list of Candidate
        Stored chunks between two holes count as holes if computing them takes less than a span's fixed cost: the
        holes are computed in one span with them.
    """
    charged: list[Candidate] = []
    gap: list[Candidate] = []
    gap_s = 0.0
    after_hole = -1
    for candidate in candidates:
        chunk, compute_s, load_s = candidate
        if load_s:
            gap.append(candidate)
            gap_s += compute_s
            continue
        whole = after_hole >= 0 and chunk - after_hole - 1 == len(gap)  # else some chunk between is loaded already
        if whole and gap_s <= fixed_s:
            charged += [(between, between_s, {}) for between, between_s, _ in gap]
        else:
            charged += gap
            compute_s += fixed_s
        charged.append((chunk, compute_s, load_s))
        gap, gap_s, after_hole = [], 0.0, chunk
    return charged + gap


def complete_landing(
    candidates: Sequence[Candidate],
    assigned: dict[int, int],
    lag_s: Sequence[float],
    most: int,
    span_s: Callable[[Sequence[int]], float],
) -> None:
    """Load the last chunks before the arms meet, too, if a span of their own would end later than that.

    The assignment spreads a span's fixed cost over full spans, which flatters a short one.

    Parameters
    ----------
    candidates, lag_s
        As for `assign_loads`.
    assigned : dict
        What `assign_loads` chose; chunks are added.
    most : int
        Chunks in the longest span: more than that are not worth a look.
    span_s : callable
        (chunks) to the seconds until a span of them would end.
    """
    busy_s = [0.0] * len(lag_s)
    short: list[tuple[int, int]] = []
    for chunk, _, load_s in candidates:
        if not load_s:
            if assigned and max(assigned) > chunk:
                busy_s = [busy + lag for busy, lag in zip(busy_s, lag_s, strict=True)]
            break
        tier = assigned.get(chunk)
        if tier is None:
            if len(short) == most:
                return
            tier = min(load_s, key=lambda tier: busy_s[tier] + load_s[tier])
            short.append((chunk, tier))
        busy_s[tier] += load_s[tier]
    if short and max(busy_s) < span_s([chunk for chunk, _ in short]):
        assigned.update(short)
