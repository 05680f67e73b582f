"""The contract of a priority policy: who gets the tokens of an engine step, and whose chunks a tier loads next.

A policy is pure: it has no clock and no state, does no I/O, and answers the same to the same question. The embedded
engine, vLLM's scheduler and the cluster simulator describe their requests as `RequestState` and follow the answers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import ClassVar, NamedTuple, Self

from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape

_NEARLY = 2.0
"""A restore gives way to decodes if I/O alone takes at most that many times as long as compute alone."""


class Kind(IntEnum):
    """What a request needs next. Lower goes first in Cake's order."""

    DECODE = 0
    PLAIN_PREFILL = 1
    STORED_PREFILL = 2
    """A prefill whose prefix is being restored, so that it advances by I/O alone if it gets no tokens."""


class RequestState(NamedTuple):
    """One request as a policy sees it. Policies read the costs of a `STORED_PREFILL` only."""

    request_id: str
    kind: Kind
    arrived_s: float
    """On the driver's clock, the one of `now`."""
    tokens: int
    """Tokens it could use in this step: 1 (or a few) for a decode, up to the back frontier for a restore."""
    admitted: bool = True
    """False for a stored-prefix request that the engine has not taken in yet, so that neither arm can work on it."""
    front_s: float = 0.0
    """Seconds of compute per token at the front frontier."""
    back_s: float = 0.0
    """Seconds of compute that each token loaded at the back frontier saves."""
    load_s: Mapping[int, float] = {}
    """Per tier with chunks left to load: seconds of its time per token; 0.0 if that is not known yet."""
    prefix_tokens: int = 0
    """Of a restore: tokens of its stored prefix."""

    @property
    def patience_s(self) -> float:
        """Seconds that the faster arm alone would need for the whole prefix; 0 if there is nothing to load."""
        return min(self._loading_s, self._computing_s) if self.load_s else 0.0

    @property
    def gives_way(self) -> bool:
        """Whether decodes should not wait for its compute: I/O alone would bring it on nearly as well."""
        return bool(self.load_s) and self._loading_s <= _NEARLY * self._computing_s

    @property
    def _restored(self) -> int:
        return max(self.prefix_tokens, self.tokens)

    @property
    def _loading_s(self) -> float:
        tokens_per_s = sum(1 / seconds for seconds in self.load_s.values() if seconds > 0)
        return self._restored / tokens_per_s if tokens_per_s else math.inf

    @property
    def _computing_s(self) -> float:
        return self._restored * (self.front_s + self.back_s) / 2

    @classmethod
    def prefill(
        cls,
        request_id: str,
        arrived_s: float,
        tokens: int,
        *,
        stored: bool,
        shape: ComputeShape,
        span_tokens: int,
        front: int,
        back: float,
        load_s: Mapping[int, float],
        prefix_tokens: int = 0,
    ) -> Self:
        """A prefill, given what its machine costs and how far both arms have come.

        Parameters
        ----------
        request_id, arrived_s, tokens, load_s, prefix_tokens
            As above.
        stored : bool
            Whether a stored prefix is being restored.
        shape : ComputeShape
            What spans cost.
        span_tokens : int
            Tokens per span.
        front, back : float
            Positions of both frontiers.
        """
        kind = Kind.STORED_PREFILL if stored else Kind.PLAIN_PREFILL
        token_s = shape.linear + shape.fixed / span_tokens
        front_s, back_s = token_s + shape.quadratic * front, token_s + shape.quadratic * back
        return cls(
            request_id,
            kind,
            arrived_s,
            tokens,
            front_s=front_s,
            back_s=back_s,
            load_s=load_s,
            prefix_tokens=prefix_tokens,
        )


class Shares(NamedTuple):
    """What a step's tokens are used for."""

    tokens: dict[str, int]
    """Tokens per request, in the order of their priority; requests that get none are left out."""
    held_back: int
    """0 or 1: a token nobody may use, so that the engine still has budget when it comes to its unadmitted requests.

    An engine whose budget is used up looks at no waiting request, and the loads of those would never begin.
    """


class Policy(ABC):
    """Orders requests for both arms.

    Decodes always come first. A prefill older than `starvation_s` comes next, the oldest first, whatever the policy
    thinks of it: after that time it waits only for decodes and for its elders. A restore advances by I/O while it is
    passed over, so it may be for as long as the faster arm alone would have taken for all of it.

    Parameters
    ----------
    starvation_s : float
        Age from which on a request is served in order of arrival, in seconds, at the least.

    Raises
    ------
    BadInput
        `starvation_s` is negative.
    """

    name: ClassVar[str]
    """As in the registry and on the command line."""

    def __init__(self, starvation_s: float = 10.0) -> None:
        if not starvation_s >= 0:
            raise BadInput(f"starvation_s is {starvation_s}: give the seconds a request may be passed over, at least 0")
        self.starvation_s = starvation_s

    @abstractmethod
    def compute_rank(self, request: RequestState) -> tuple[float, ...]:
        """Sort key among prefills for compute; the smallest goes first, ties in order of arrival."""

    @abstractmethod
    def load_rank(self, request: RequestState, tier: int) -> tuple[float, ...]:
        """Sort key among restores for the time of `tier`; the smallest goes first, ties in order of arrival."""

    def compute_order(self, requests: Iterable[RequestState], now: float) -> list[RequestState]:
        """All requests, the one to compute first at the front."""

        def key(request: RequestState) -> tuple[int, tuple[float, ...], float, str]:
            group = 0 if request.kind is Kind.DECODE else 1 if self._overdue(request, now) else 2
            rank = self.compute_rank(request) if group == 2 else ()
            return group, rank, request.arrived_s, request.request_id

        return sorted(requests, key=key)

    def load_order(self, requests: Iterable[RequestState], tier: int, now: float) -> list[RequestState]:
        """The admitted restores with chunks to load from `tier`, the one to load for first at the front."""

        def key(request: RequestState) -> tuple[int, tuple[float, ...], float, str]:
            overdue = self._overdue(request, now)
            rank = () if overdue else self.load_rank(request, tier)
            return 1 - overdue, rank, request.arrived_s, request.request_id

        return sorted((request for request in requests if request.admitted and tier in request.load_s), key=key)

    def share(
        self, requests: Iterable[RequestState], budget: int, now: float, beside_decodes: int | None = None
    ) -> Shares:
        """Share out an engine step.

        Parameters
        ----------
        requests : iterable of RequestState
            Running and waiting ones, with unique ids.
        budget : int
            Tokens the step may compute.
        now : float
            Seconds on the clock of `RequestState.arrived_s`.
        beside_decodes : int or None
            Tokens of prefills that a step with decodes can do with. Restores that give way get what other prefills
            leave of them, however old they are. None: any number.

        Returns
        -------
        Shares
            Together with `held_back` they use the whole budget, or give every admitted request all it asked for, but
            for restores that give way to decodes.
        """
        left = budget
        held_back = 0
        tokens: dict[str, int] = {}
        requests = list(requests)
        waits_unadmitted = any(not request.admitted for request in requests)
        decodes = any(request.kind is Kind.DECODE for request in requests)
        spare = budget if beside_decodes is None or not decodes else beside_decodes
        for request in self.compute_order(requests, now):
            if waits_unadmitted and not held_back and request.kind is not Kind.DECODE:
                held_back = min(1, left)
                left -= held_back
            taken = min(left, request.tokens) if request.admitted else 0
            if request.kind is Kind.STORED_PREFILL and request.gives_way:
                taken = min(taken, spare)
            if request.kind is not Kind.DECODE:
                spare = max(0, spare - taken)
            if taken > 0:
                tokens[request.request_id] = taken
                left -= taken
        return Shares(tokens, held_back)

    def _overdue(self, request: RequestState, now: float) -> bool:
        age_s = now - request.arrived_s
        return age_s >= self.starvation_s and age_s >= request.patience_s
