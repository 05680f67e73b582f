"""The clairvoyant bound: how soon both arms could be done if they met at the best point, without granularity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cakekv.errors import CakeError
from cakekv.restore.report import LoadRecord, SpanRecord


class Curve(NamedTuple):
    """A time that grows, or shrinks, with the position: straight lines between measured points."""

    positions: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def at(self, position: float) -> float:
        """Seconds at a position; beyond the ends, those of the ends."""
        return float(np.interp(position, self.positions, self.seconds))


class Bound(NamedTuple):
    """The least time to first token, and the meeting point (in tokens, not rounded) that gives it."""

    seconds: float
    meet_at: float


def compute_curve(spans: Sequence[SpanRecord]) -> Curve:
    """Seconds to compute everything below a position, from a run that computed everything.

    Raises
    ------
    CakeError
        The spans do not follow one another from position 0.
    """
    _check_contiguous("computed", spans)
    positions = [0.0, *(float(span.start + span.tokens) for span in spans)]
    seconds = np.cumsum([0.0, *(span.ended_s - span.began_s for span in spans)])
    return Curve(np.array(positions), seconds)


def load_curve(loads: Sequence[LoadRecord]) -> Curve:
    """Seconds to load everything from a position up to the end of the prefix, from a run that loaded all of it.

    A chunk's own time is its share of the time it was in flight: loads in flight together share that time evenly.

    Raises
    ------
    CakeError
        The loads do not cover the prefix, each chunk once.
    """
    placed = sorted(load for load in loads if load.outcome == "placed")
    _check_contiguous("loaded", placed)
    own_s = dict.fromkeys((load.start for load in placed), 0.0)
    for began_s, ended_s in pairwise(sorted({time for load in placed for time in (load.began_s, load.ended_s)})):
        in_flight = [load.start for load in placed if load.began_s <= began_s and ended_s <= load.ended_s]
        for start in in_flight:
            own_s[start] += (ended_s - began_s) / len(in_flight)
    positions = [0.0, *(float(load.start + load.tokens) for load in placed)]
    from_start = np.cumsum([0.0, *(own_s[load.start] for load in placed)])
    return Curve(np.array(positions), from_start[-1] - from_start)


def clairvoyant_bound(
    spans: Sequence[SpanRecord], loads: Sequence[LoadRecord], prefix_tokens: int, suffix_s: float
) -> Bound:
    """Least TTFT of a restore whose arms start together and run as fast as they did alone.

    The minimum, over real numbers m, of the longer of computing [0, m) and loading [m, prefix), and then the suffix;
    or computing everything, if that is sooner.

    Parameters
    ----------
    spans : sequence of SpanRecord
        Of a run in mode "compute", over the whole prompt.
    loads : sequence of LoadRecord
        Of a run in mode "load", over the whole prefix.
    prefix_tokens : int
        Length of the prefix.
    suffix_s : float
        Seconds to compute the suffix on its own, as the run that loaded the prefix did.

    Raises
    ------
    CakeError
        The records do not cover the prefix.
    """
    front, rest = compute_curve(spans), load_curve(loads)
    if rest.positions[-1] != prefix_tokens or front.positions[-1] < prefix_tokens:
        raise CakeError(
            f"no bound can be told: the prefix ends at {prefix_tokens}, what was computed at "
            f"{front.positions[-1]:.0f}, what was loaded at {rest.positions[-1]:.0f}"
        )
    # The longer of a rising and a falling line is least where they cross; both are straight between breakpoints.
    breakpoints = np.union1d(front.positions[front.positions <= prefix_tokens], rest.positions)
    lead = np.array([front.at(m) - rest.at(m) for m in breakpoints])
    after = int(np.argmax(lead >= 0))
    if after == 0:
        meet_at = float(breakpoints[0])
    else:
        share = -lead[after - 1] / (lead[after] - lead[after - 1])
        meet_at = float(breakpoints[after - 1] + share * (breakpoints[after] - breakpoints[after - 1]))
    seconds = max(front.at(meet_at), rest.at(meet_at)) + suffix_s
    everything_s = float(front.seconds[-1])
    return Bound(seconds, meet_at) if seconds < everything_s else Bound(everything_s, float(prefix_tokens))


def _check_contiguous(what: str, records: Sequence[SpanRecord | LoadRecord]) -> None:
    end = 0
    for record in records:
        if record.start != end:
            raise CakeError(f"no bound can be told: what was {what} jumps from position {end} to {record.start}")
        end += record.tokens
    if not records:
        raise CakeError(f"no bound can be told: nothing was {what}")
