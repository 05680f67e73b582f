"""Whose turn it is to compute, when several requests want to."""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.restore.priority.base import Kind, Policy, RequestState


class Turns:
    """Hands out the compute arm, one span or one decode step at a time.

    Pure: it is told who takes the arm and who gives it back, and answers who is next. As in an engine's step, where
    every decode gets a token and the prefills what is left, each decode that asks gets one step between two spans: it
    never waits for more than one span, and never keeps the prefills from theirs.

    Parameters
    ----------
    policy : Policy
        Orders the requests.

    Attributes
    ----------
    holder : str or None
        The request that has the arm.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._stepped: set[str] = set()
        """Decodes that had a step since the last span."""
        self.holder: str | None = None

    def next(self, asking: Sequence[RequestState], now: float) -> str | None:
        """Whose turn it is, of those that ask; None while the arm is held, or if nobody asks.

        Parameters
        ----------
        asking : sequence of RequestState
            Those that could compute right away, also the one that has just given the arm back.
        now : float
            Seconds on the clock of `RequestState.arrived_s`.
        """
        if self.holder is not None or not asking:
            return None
        waiting = [request for request in asking if request.request_id not in self._stepped]
        return self._policy.compute_order(waiting or asking, now)[0].request_id

    def take(self, request_id: str, kind: Kind) -> None:
        """The request has the arm now."""
        assert self.holder is None, f"{self.holder} has the compute arm"
        self.holder = request_id
        if kind is not Kind.DECODE or request_id in self._stepped:
            self._stepped.clear()
        if kind is Kind.DECODE:
            self._stepped.add(request_id)

    def give_back(self, request_id: str) -> None:
        """The request does not have the arm any more, if it had it."""
        if self.holder == request_id:
            self.holder = None
