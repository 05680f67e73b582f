"""What a restore may do, and until when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Mode = Literal["auto", "compute", "load", "both"]
MODES: tuple[Mode, ...] = ("auto", "compute", "load", "both")


@dataclass(frozen=True)
class PlannerOptions:
    """How a planner is to work.

    Parameters
    ----------
    mode : {"auto", "compute", "load", "both"}
        "compute" loads nothing, "load" computes only what cannot be loaded, "both" puts both arms to work whether it
        pays or not (the first stored chunk is computed, the last one requested), "auto" leaves an idle arm idle.
    max_span_tokens : int
        Longest span to compute at a time.
    window : int or None
        Widest sliding window of the model in tokens.
    ttft_target_s : float
        Seconds from the start until everything should be covered: chunks are read as exactly as that allows.
    deadline_s : float
        No load is waited for longer than that. A load from a tier of known speed is given up sooner: after ten times
        what it should take, but not before two seconds. Without a deadline, one from a tier of unknown speed is given
        up after 30 seconds.

    Raises
    ------
    ValueError
        There is no such mode, or spans are shorter than a token.
    """

    mode: Mode = "auto"
    max_span_tokens: int = 512
    window: int | None = None
    ttft_target_s: float = math.inf
    deadline_s: float = math.inf

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.max_span_tokens < 1:
            raise ValueError(f"lengths must be positive: max_span_tokens={self.max_span_tokens}")
