"""How the next token is chosen, and what was chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from cakekv.errors import BadInput
from cakekv.quantities import real, whole

MOST_LOGPROBS = 100
_MOST_PENALTY = 100.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; as in `Cake.stream`.

    Raises
    ------
    BadInput
        A setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if real("temperature", self.temperature, 0.0) == math.inf:
            raise BadInput("temperature must be 0 (greedy) or a positive number, not inf")
        if self.top_k is not None:
            whole("top_k", self.top_k, 1)
        if self.top_p is not None and real("top_p", self.top_p, 0.0, 1.0) == 0:
            raise BadInput("top_p must be above 0 and at most 1, not 0")
        if self.min_p is not None:
            real("min_p", self.min_p, 0.0, 1.0)
        real("repetition_penalty", self.repetition_penalty, 1 / _MOST_PENALTY, _MOST_PENALTY)
        real("presence_penalty", self.presence_penalty, -_MOST_PENALTY, _MOST_PENALTY)
        real("frequency_penalty", self.frequency_penalty, -_MOST_PENALTY, _MOST_PENALTY)
        if self.logprobs is not None:
            whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before are less likely, or more."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_plain(self) -> bool:
        """Whether temperature, top_k, top_p and seed say all."""
        return not self.penalizes and not self.min_p and self.logprobs is None


class Choice(NamedTuple):
    """A token that was chosen."""

    token: int
    logprob: float | None = None
    """The logarithm of its probability, as the model gave it: before penalties, temperature and the like."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs, the likeliest first."""
