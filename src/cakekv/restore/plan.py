"""The plan: which of the uncovered chunks to load, given what both arms cost. The rest is computed.

Compute walks the uncovered chunks in order of position. A chunk that nobody stored (a hole, and the suffix) can only
be computed once everything before it is covered; it is a *deadline* for every load before it. Loading a chunk saves
its compute time, and late chunks save most (attention grows with position, bytes do not). So the plan takes the chunks
from the back and gives each to the source with the most time to spare before the deadlines that follow the chunk,
as long as the load ends before compute would get there. What is left below is computed meanwhile: both arms end
together. With one source and no hole this is Cake's meeting point (arXiv 2410.03065, section 3), known in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

Candidate = tuple[int, float, Mapping[int, float]]
"""An uncovered chunk: its index, the seconds to compute it, and per source that could deliver it the seconds that its
load keeps that source busy; no source for a hole."""


def assign_loads(
    candidates: Sequence[Candidate], sources: int, compute_busy_s: float = 0.0, finish_s: float = 0.0
) -> dict[int, int]:
    """Choose the chunks to load.

    Parameters
    ----------
    candidates : sequence of Candidate
        All uncovered chunks, by ascending position. The last one is a hole (the suffix is never stored).
    sources : int
        How many sources there are.
    compute_busy_s : float
        Seconds until compute is done with what it is doing now.
    finish_s : float
        Seconds that loads before the suffix may go on while the suffix is computed (see `layered`).

    Returns
    -------
    dict
        Chunk to source, for the chunks to load.
    """
    before_s = compute_busy_s + sum(candidate[1] for candidate in candidates)
    saved_s = 0.0
    spare_s = [float("inf")] * sources
    """Per source: `saved_s` and the least time left before any deadline behind the current chunk."""
    chosen: dict[int, int] = {}
    suffix_passed = False
    for chunk, compute_s, load_s in reversed(candidates):
        before_s -= compute_s
        if not load_s:
            # Loads of chunks behind this hole can wait; only those before it are due when compute gets here.
            due_s = before_s + saved_s + (0.0 if suffix_passed else finish_s)
            spare_s = [due_s if spare > due_s else spare for spare in spare_s]
            continue
        suffix_passed = True
        best, most = -1, saved_s
        for source, seconds in load_s.items():
            left = spare_s[source] - seconds
            if left > most:
                best, most = source, left
        if best >= 0:
            chosen[chunk] = best
            spare_s[best] = most
            saved_s += compute_s
    return chosen


def complete_landing(
    candidates: Sequence[Candidate], plan: dict[int, int], sources: int, most: int, span_s: Callable[[int, int], float]
) -> None:
    """Load the last chunks before the arms meet, too, if a span of their own would end later than that.

    The plan spreads a span's fixed cost over full spans, which flatters a short one.

    Parameters
    ----------
    candidates, sources
        As for `assign_loads`.
    plan : dict
        What `assign_loads` chose; chunks are added.
    most : int
        Chunks in the longest span: more than that are not worth a look.
    span_s : callable
        (first chunk, chunks) to the seconds until a span of them would end.
    """
    busy_s = [0.0] * sources
    short: list[tuple[int, int]] = []
    for chunk, _, load_s in candidates:
        if not load_s:
            break
        source = plan.get(chunk)
        if source is None:
            if len(short) == most:
                return
            source = min(load_s, key=lambda source: busy_s[source] + load_s[source])
            short.append((chunk, source))
        busy_s[source] += load_s[source]
    if short and max(busy_s) < span_s(short[0][0], len(short)):
        plan.update(short)


def order_loads(
    candidates: Sequence[Candidate], plan: Mapping[int, int], sources: int, holes: Container[int]
) -> list[list[int]]:
    """The planned chunks of each source, the one due first at the end: nearest hole first, back to front before it."""
    queues: list[list[int]] = [[] for _ in range(sources)]
    group: list[list[int]] = [[] for _ in range(sources)]
    for chunk, _, _ in reversed(candidates):
        if chunk in plan:
            group[plan[chunk]].append(chunk)
        elif chunk in holes:
            for queue, chunks in zip(queues, group, strict=True):
                queue.extend(reversed(chunks))
                chunks.clear()
    for queue, chunks in zip(queues, group, strict=True):
        queue.extend(reversed(chunks))
    return queues
