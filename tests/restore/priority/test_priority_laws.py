"""What every policy must keep, whatever the requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.restore.priority import POLICIES, Kind, Policy, RequestState, open_policy

COSTS = st.sampled_from([0.0, 1e-5, 1e-4, 3e-4])
LOADS = st.dictionaries(st.integers(0, 1), COSTS, max_size=2)
REQUEST = st.builds(
    lambda kind, arrived_s, tokens, admitted, front_s, back_s, load_s: RequestState(
        "",
        kind,
        arrived_s,
        1 + tokens % 4 if kind is Kind.DECODE else tokens,
        admitted or kind is not Kind.STORED_PREFILL,
        front_s,
        back_s,
        load_s if kind is Kind.STORED_PREFILL else {},
    ),
    st.sampled_from(Kind),
    st.floats(0.0, 20.0),
    st.integers(0, 2000),
    st.booleans(),
    COSTS,
    COSTS,
    LOADS,
)
REQUESTS = st.lists(REQUEST, max_size=12).map(
    lambda requests: [request._replace(request_id=f"r{index}") for index, request in enumerate(requests)]
)
BUDGET = st.integers(0, 4096)
NOW = 20.0


@pytest.fixture(params=sorted(POLICIES), scope="module")
def policy(request: pytest.FixtureRequest) -> Policy:
    return open_policy(request.param, starvation_s=10.0)


def is_overdue(request: RequestState, policy: Policy) -> bool:
    return NOW - request.arrived_s >= max(policy.starvation_s, request.patience_s)


@settings(deadline=None)
@given(requests=REQUESTS, budget=BUDGET)
def test_budget_is_used_and_never_exceeded(policy: Policy, requests: list[RequestState], budget: int) -> None:
    shares = policy.share(requests, budget, NOW)
    by_id = {request.request_id: request for request in requests}
    for request_id, tokens in shares.tokens.items():
        assert by_id[request_id].admitted
        assert 0 < tokens <= by_id[request_id].tokens
    used = sum(shares.tokens.values())
    wanted = sum(request.tokens for request in requests if request.admitted)
    assert used + shares.held_back == min(budget, wanted + shares.held_back)
    decoding = sum(request.tokens for request in requests if request.kind is Kind.DECODE)
    waits = any(not request.admitted for request in requests)
    assert shares.held_back == (1 if waits and budget > decoding else 0)


@settings(deadline=None)
@given(requests=REQUESTS, budget=BUDGET)
def test_decodes_come_first(policy: Policy, requests: list[RequestState], budget: int) -> None:
    tokens = policy.share(requests, budget, NOW).tokens
    decodes = [request for request in requests if request.kind is Kind.DECODE]
    given_to_decodes = sum(tokens.get(request.request_id, 0) for request in decodes)
    assert given_to_decodes == min(budget, sum(request.tokens for request in decodes))


@settings(deadline=None)
@given(requests=REQUESTS, budget=BUDGET)
def test_nobody_younger_is_served_before_one_past_the_bound(
    policy: Policy, requests: list[RequestState], budget: int
) -> None:
    tokens = policy.share(requests, budget, NOW).tokens
    for request in requests:
        overdue = request.kind is not Kind.DECODE and is_overdue(request, policy)
        if overdue and request.admitted and tokens.get(request.request_id, 0) < request.tokens:
            younger = [other for other in requests if other.arrived_s > request.arrived_s]
            assert not any(tokens.get(other.request_id) for other in younger if other.kind is not Kind.DECODE)


@settings(deadline=None)
@given(requests=REQUESTS, tier=st.integers(0, 1))
def test_loads_are_for_admitted_restores_that_need_the_source(
    policy: Policy, requests: list[RequestState], tier: int
) -> None:
    order = policy.load_order(requests, tier, NOW)
    assert {request.request_id for request in order} == {
        request.request_id for request in requests if request.admitted and tier in request.load_s
    }
    overdue = [request.arrived_s for request in order if is_overdue(request, policy)]
    assert [request.arrived_s for request in order[: len(overdue)]] == sorted(overdue)


@settings(deadline=None)
@given(requests=REQUESTS, budget=BUDGET, seed=st.integers(0, 2**32))
def test_the_answer_depends_on_nothing_but_the_question(
    policy: Policy, requests: list[RequestState], budget: int, seed: int
) -> None:
    shuffled = list(requests)
    random.Random(seed).shuffle(shuffled)
    first, second = policy.share(requests, budget, NOW), policy.share(shuffled, budget, NOW)
    assert list(first.tokens.items()) == list(second.tokens.items())
    assert first.held_back == second.held_back
    assert policy.load_order(requests, 0, NOW) == policy.load_order(shuffled, 0, NOW)


@settings(deadline=None)
@given(flood_tokens=st.integers(512, 4096))
def test_a_flood_delays_a_restore_by_no_more_than_the_bound(policy: Policy, flood_tokens: int) -> None:
    """One step per second with 512 tokens; every second a plain prefill arrives that could use them all."""
    left = 1000
    waiting: dict[str, RequestState] = {}
    for second in range(40):
        flood = RequestState(f"flood{second:02}", Kind.PLAIN_PREFILL, second + 0.5, flood_tokens)
        waiting[flood.request_id] = flood
        now = second + 1.0
        restore = RequestState("restore", Kind.STORED_PREFILL, 1.0, left, front_s=1e-4, back_s=1e-4, load_s={0: 1e-4})
        tokens = policy.share([*waiting.values(), restore], 512, now).tokens
        left -= tokens.get("restore", 0)
        if left == 0:
            break
        for name in tokens.keys() & waiting.keys():
            rest = waiting[name].tokens - tokens[name]
            waiting[name] = waiting[name]._replace(tokens=rest)
    # Its elder (at most 4,096 tokens, 8 steps) may go first. 1,000 tokens are two steps, the first at the bound.
    assert left == 0
    assert now <= 1.0 + policy.starvation_s + 8 + 2
