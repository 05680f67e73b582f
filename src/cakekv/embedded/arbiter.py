"""Lets the requests of one model take turns: the policy decides whose turn it is, this waits and wakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from cakekv.embedded.executor import check
from cakekv.restore.contention import Burden, burdens
from cakekv.restore.priority import Kind, Policy, RequestState, Turns
from cakekv.results import OnProgress, Progress


class OpenPrefill(Protocol):
    """A prefill that takes turns with others. The arbiter calls it with its lock held."""

    def state(self) -> RequestState:
        """What a policy wants to know of it."""

    def bear(self, burden: Burden) -> None:
        """The other requests are that much in its way."""


class Request:
    """One request that is being served.

    Attributes
    ----------
    id : str
        Sorts in order of arrival.
    arrived_s : float
        `time.monotonic()` at its arrival.
    woken : Condition
        Notified when it may be its turn, or something it waits for has happened; of the arbiter's lock.
    prefill : OpenPrefill or None
        Its prefill, from `Arbiter.open` to `Arbiter.close`; before and after that, it decodes.
    background : bool
        Whether it computes only while no other prefill is open.
    notes : list of str
        What a person should know about it, in sentences; they go into its report.
    """

    def __init__(self, number: int, arrived_s: float, lock: threading.Lock) -> None:
        self.id = f"{number:012}"
        self.arrived_s = arrived_s
        self.woken = threading.Condition(lock)
        self.prefill: OpenPrefill | None = None
        self.background = False
        self.notes: list[str] = []

    def state(self) -> RequestState:
        """The request as a policy sees it."""
        if self.prefill is None:
            return RequestState(self.id, Kind.DECODE, self.arrived_s, tokens=1)
        return self.prefill.state()


class Arbiter:
    """Who computes, and in which order tiers work for the open requests.

    `lock` guards it, and everything that the requests share: their planners, and what compute and tiers cost. While
    there is a single request, nothing is compared and nobody is woken.

    Parameters
    ----------
    policy : Policy
        Orders the requests.
    """

    def __init__(self, policy: Policy) -> None:
        self.lock = threading.Lock()
        self._policy = policy
        self._turns = Turns(policy)
        self._asking: dict[str, Request] = {}
        self._open: dict[str, Request] = {}
        self._numbers = 0
        self.teller: int | None = None
        """The thread that runs a caller's callback with the lock held."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody computes, or wants to."""
        return not self._open and not self._asking

    def request(self, arrived_s: float) -> Request:
        """A new request."""
        with self.lock:
            self._numbers += 1
            return Request(self._numbers, arrived_s, self.lock)

    # The following are called with `lock` held.

    def open(self, request: Request, prefill: OpenPrefill) -> None:
        """The request's prefill begins: both arms work for it."""
        request.prefill = prefill
        self._open[request.id] = request

    def close(self, request: Request) -> None:
        """The request's prefill is over, whether it succeeded or not."""
        self._open.pop(request.id, None)
        self.give_back(request)
        request.prefill = None
        if len(self._open) == 1:
            for other in self._open.values():
                _bear(other, Burden())

    def take(self, request: Request) -> None:
        """Wait until it is the request's turn to compute."""
        self._asking[request.id] = request
        try:
            check()
            while (first := self._first()) is not request:
                if first is not None:  # the order has changed since this request was woken
                    first.woken.notify_all()
                request.woken.wait()
                check()
            self._turns.take(request.id, request.state().kind)
        except BaseException:
            self.give_back(request)
            raise

    def give_back(self, request: Request, asks_again: bool = False) -> None:
        """The request has computed, or has nothing to compute for now."""
        self._turns.give_back(request.id)
        if not asks_again:
            self._asking.pop(request.id, None)
        first = self._first()
        if first is not None and first is not request:
            first.woken.notify_all()

    def load_order(self, tier: int, now: float) -> list[Request]:
        """The open requests that `tier` may work for, the one to serve first at the front."""
        if len(self._open) < 2:
            return list(self._open.values())
        states = self._weigh(now)
        return [self._open[state.request_id] for state in self._policy.load_order(states, tier, now)]

    def weigh(self, now: float) -> None:
        """Tell the open requests what they are to each other."""
        if len(self._open) > 1:
            self._weigh(now)

    def tell(self, on_progress: OnProgress, progress: Progress) -> None:
        """Tell a caller of progress, who must not call a `Cake` from there."""
        self.teller = threading.get_ident()
        try:
            on_progress(progress)
        finally:
            self.teller = None

    # The following are called without it.

    def wake(self) -> None:
        """Have all who wait for their turn `check` whether they still should."""
        with self.lock:
            for request in [*self._asking.values(), *self._open.values()]:
                request.woken.notify_all()

    @contextmanager
    def turn(self, request: Request) -> Iterator[None]:
        """The compute arm for the duration of the `with` block."""
        try:
            with self.lock:
                self.take(request)
            yield
        finally:
            with self.lock:
                self.give_back(request)

    @contextmanager
    def lent(self, request: Request) -> Iterator[None]:
        """Let others have the compute arm, which the request holds, during the `with` block."""
        with self.lock:
            self.give_back(request)
        yield
        with self.lock:
            self.take(request)

    def _first(self) -> Request | None:
        """Whose turn it is; None if the arm is in use or not wanted."""
        if self._turns.holder is not None or not self._asking:
            return None
        asking = list(self._asking.values())
        if any(request.background for request in asking):
            others = [request for request in asking if not request.background]
            if not others and not all(request.background for request in self._open.values()):
                return None
            asking = others or asking
        if len(asking) == 1:
            return asking[0]
        states = [request.state() for request in asking]
        first = self._turns.next(states, monotonic())
        return None if first is None else self._asking[first]

    def _weigh(self, now: float) -> Sequence[RequestState]:
        states = [request.state() for request in self._open.values()]
        for request_id, burden in burdens(states, self._policy, now).items():
            _bear(self._open[request_id], burden)
        return states


def _bear(request: Request, burden: Burden) -> None:
    assert request.prefill is not None, "an open request has a prefill"
    request.prefill.bear(burden)
