"""Who computes next, told in events: by hand, and what must hold whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.restore.priority import POLICIES, Kind, RequestState, Turns, open_policy


def state(name: str, kind: Kind, arrived_s: float = 0.0, load_s: float = 1e-3) -> RequestState:
    stored = {"front_s": 1e-3, "back_s": 2e-3, "load_s": {0: load_s}} if kind is Kind.STORED_PREFILL else {}
    return RequestState(name, kind, arrived_s, 1 if kind is Kind.DECODE else 500, **stored)  # type: ignore[arg-type]


def play(turns: Turns, asking: list[RequestState], rounds: int, now: float = 0.0) -> list[str]:
    """Everyone goes on asking; who had the arm?"""
    kinds = {request.request_id: request.kind for request in asking}
    order = []
    for _ in range(rounds):
        name = turns.next(asking, now)
        assert name is not None
        turns.take(name, kinds[name])
        turns.give_back(name)
        order.append(name)
    return order


def test_nobody_is_next_while_the_arm_is_held() -> None:
    turns = Turns(open_policy("cake"))
    asking = [state("a", Kind.PLAIN_PREFILL)]
    assert turns.next([], 0.0) is None
    turns.take("a", Kind.PLAIN_PREFILL)
    assert turns.next(asking, 0.0) is None
    turns.give_back("other")
    assert turns.holder == "a"
    turns.give_back("a")
    assert turns.next(asking, 0.0) == "a"


def test_a_plain_prefill_overtakes_a_restore_at_its_next_span() -> None:
    turns = Turns(open_policy("cake"))
    stored, plain = state("s", Kind.STORED_PREFILL), state("p", Kind.PLAIN_PREFILL, 1.0)
    assert play(turns, [stored], 2) == ["s", "s"]
    assert play(turns, [stored, plain], 3, now=1.0) == ["p", "p", "p"]
    assert play(Turns(open_policy("fcfs")), [stored, plain], 3, now=1.0) == ["s", "s", "s"]


def test_every_decode_gets_one_step_between_two_spans() -> None:
    asking = [state("a", Kind.DECODE), state("b", Kind.DECODE, 1.0), state("p", Kind.PLAIN_PREFILL)]
    assert play(Turns(open_policy("cake")), asking, 6) == ["a", "b", "p", "a", "b", "p"]


def test_decodes_alone_go_round() -> None:
    asking = [state("a", Kind.DECODE), state("b", Kind.DECODE, 1.0)]
    assert play(Turns(open_policy("cake")), asking, 4) == ["a", "b", "a", "b"]


def test_of_restores_the_one_that_io_helps_least_computes_first() -> None:
    slow, fast = state("slow", Kind.STORED_PREFILL, 1.0, load_s=6e-3), state("fast", Kind.STORED_PREFILL, load_s=1e-3)
    assert play(Turns(open_policy("marginal_saving")), [fast, slow], 1, now=1.0) == ["slow"]
    assert play(Turns(open_policy("cake")), [fast, slow], 1, now=1.0) == ["fast"]


def test_a_restore_past_the_bound_is_next_to_compute() -> None:
    asking = [state("s", Kind.STORED_PREFILL), state("p", Kind.PLAIN_PREFILL, 5.0), state("d", Kind.DECODE, 9.0)]
    turns = Turns(open_policy("cake", starvation_s=10.0))
    assert play(turns, asking, 4, now=9.9) == ["d", "p", "d", "p"]
    assert play(turns, asking, 4, now=10.0) == ["d", "s", "d", "s"]


REQUESTS = st.lists(st.tuples(st.sampled_from(Kind), st.floats(0.0, 8.0)), min_size=1, max_size=8).map(
    lambda rows: [state(f"r{number}", kind, arrived_s) for number, (kind, arrived_s) in enumerate(rows)]
)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(deadline=None)
@given(requests=REQUESTS, data=st.data())
def test_laws_when_requests_ask_and_pause_at_random(
    policy: str, requests: list[RequestState], data: st.DataObject
) -> None:
    rules = open_policy(policy, starvation_s=20.0)
    turns = Turns(rules)
    spans_waited = {request.request_id: 0 for request in requests}
    for step in range(data.draw(st.integers(1, 40))):
        now = 8.0 + step
        numbers = data.draw(st.sets(st.integers(0, len(requests) - 1), min_size=1))
        asking = [requests[number] for number in sorted(numbers)]
        name = turns.next(asking, now)
        chosen = next(request for request in asking if request.request_id == name)
        assert turns.next(asking[::-1], now) == name, "nothing but the question decides"
        turns.take(chosen.request_id, chosen.kind)
        turns.give_back(chosen.request_id)
        prefills = [request for request in asking if request.kind is not Kind.DECODE]
        if chosen.kind is not Kind.DECODE:
            assert chosen == rules.compute_order(prefills, now)[0], "spans go by the policy"
        for request in requests:
            if request.kind is not Kind.DECODE or request not in asking or request == chosen:
                spans_waited[request.request_id] = 0
            elif chosen.kind is not Kind.DECODE:
                spans_waited[request.request_id] += 1
                assert spans_waited[request.request_id] <= 1, "no decode waits for two spans"


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(deadline=None)
@given(requests=REQUESTS)
def test_everyone_who_goes_on_asking_is_served_within_the_bound(policy: str, requests: list[RequestState]) -> None:
    """Whoever had 3 turns is done; new plain prefills come for ever. A turn takes a second."""
    turns = Turns(open_policy(policy, starvation_s=20.0))
    left = {request.request_id: 3 for request in requests}
    open_now = {request.request_id: request for request in requests}
    for step in range(20 + 3 * 3 * len(requests) + 40):
        now = 8.0 + step
        flood = state(f"z{step:03}", Kind.PLAIN_PREFILL, now)
        open_now[flood.request_id], left[flood.request_id] = flood, 3
        name = turns.next(list(open_now.values()), now)
        assert name is not None
        turns.take(name, open_now[name].kind)
        turns.give_back(name)
        left[name] -= 1
        if not left[name]:
            del open_now[name]
    assert not any(name.startswith("r") for name in open_now)
