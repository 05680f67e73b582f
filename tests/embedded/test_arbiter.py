"""Waiting and waking, with threads that only note their turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

import pytest

from cakekv.embedded.arbiter import Arbiter, Request
from cakekv.restore.contention import Burden
from cakekv.restore.priority import Kind, RequestState, open_policy


class Described:
    """A prefill that stays as it is, and notes what is asked of it and what it is told."""

    def __init__(self, state: RequestState) -> None:
        self.asked = 0
        self.told: list[Burden] = []
        self._state = state

    def state(self) -> RequestState:
        self.asked += 1
        return self._state

    def bear(self, burden: Burden) -> None:
        self.told.append(burden)


def described(arbiter: Arbiter, kind: Kind, tokens: int = 1000) -> tuple[Request, Described]:
    request = arbiter.request(monotonic())
    load_s = {0: 1e-3} if kind is Kind.STORED_PREFILL else {}
    state = RequestState(request.id, kind, request.arrived_s, tokens, front_s=1e-3, back_s=1e-3, load_s=load_s)
    return request, Described(state)


def opened(arbiter: Arbiter, kind: Kind) -> Request:
    request, prefill = described(arbiter, kind)
    request.prefill = prefill
    return request


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_for_asking(arbiter: Arbiter, count: int) -> None:
    while len(arbiter._asking) < count:
        threading.Event().wait(0.001)


@pytest.mark.timeout(60)
def test_whoever_the_policy_ranks_first_comes_next() -> None:
    arbiter, order = Arbiter(open_policy("cake")), list[str]()
    kinds = {"stored": Kind.STORED_PREFILL, "plain": Kind.PLAIN_PREFILL, "decode": Kind.DECODE}
    holder = opened(arbiter, Kind.PLAIN_PREFILL)
    threads = []
    with arbiter.turn(holder):
        for number, (name, kind) in enumerate(kinds.items()):

            def work(name: str = name, kind: Kind = kind) -> None:
                with arbiter.turn(opened(arbiter, kind)):
                    order.append(name)

            threads.append(in_thread(work))
            wait_for_asking(arbiter, number + 2)
    for thread in threads:
        thread.join()
    assert order == ["decode", "plain", "stored"]


@pytest.mark.timeout(60)
def test_who_is_interrupted_while_it_waits_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    arbiter = Arbiter(open_policy("cake"))
    first, interrupted, last = (opened(arbiter, Kind.PLAIN_PREFILL) for _ in range(3))

    def interrupt() -> None:
        raise KeyboardInterrupt

    interrupted.woken.wait = interrupt  # type: ignore[assignment]
    done: list[str] = []

    def work() -> None:
        with arbiter.turn(last):
            done.append("last")

    with arbiter.turn(first):
        with pytest.raises(KeyboardInterrupt), arbiter.turn(interrupted):
            done.append("never")
        thread = in_thread(work)
        wait_for_asking(arbiter, 2)
    thread.join()
    assert done == ["last"]
    assert not arbiter._asking


def test_alone_nothing_is_described_and_nobody_is_woken() -> None:
    arbiter = Arbiter(open_policy("marginal_saving"))
    request, prefill = described(arbiter, Kind.PLAIN_PREFILL)
    woken: list[None] = []
    request.woken.notify_all = lambda: woken.append(None)
    with arbiter.lock:
        arbiter.open(request, prefill)
        arbiter.take(request)
        arbiter.weigh(0.0)
        arbiter.give_back(request, asks_again=True)
        assert arbiter.load_order(0, 0.0) == [request]
        arbiter.close(request)
    assert not woken
    assert prefill.asked == 1, "its kind, when it takes the arm"
    assert request.state().kind is Kind.DECODE, "from then on"


def test_requests_are_told_what_they_are_to_each_other() -> None:
    arbiter = Arbiter(open_policy("cake"))
    stored, prefill = described(arbiter, Kind.STORED_PREFILL)
    plain, other = described(arbiter, Kind.PLAIN_PREFILL, tokens=3000)
    with arbiter.lock:
        arbiter.open(stored, prefill)
        arbiter.weigh(0.0)
        assert prefill.told == []
        arbiter.open(plain, other)
        arbiter.weigh(0.0)
        (burden,) = prefill.told
        assert burden.compute == pytest.approx(4.0)
        assert burden.load == {0: 1.0}
        assert arbiter.load_order(0, 0.0) == [stored]
        arbiter.close(plain)
        assert prefill.told[-1] == Burden()
