"""Each policy on cases small enough to work out by hand."""

from __future__ import annotations

import pytest

from cakekv.errors import BadInput
from cakekv.restore.priority import Kind, RequestState, Shares, open_policy


def decode(name: str, arrived_s: float = 0.0) -> RequestState:
    return RequestState(name, Kind.DECODE, arrived_s, tokens=1)


def plain(name: str, arrived_s: float, tokens: int) -> RequestState:
    return RequestState(name, Kind.PLAIN_PREFILL, arrived_s, tokens)


def restore(name: str, arrived_s: float, tokens: int, **costs: object) -> RequestState:
    return RequestState(name, Kind.STORED_PREFILL, arrived_s, tokens, **costs)  # type: ignore[arg-type]


def test_fcfs_shares_in_order_of_arrival() -> None:
    requests = [plain("late", 2.0, 400), restore("early", 1.0, 300), decode("d", 3.0)]
    # 512 - 1 for the decode - 300 for the first = 211 for the second
    assert open_policy("fcfs").share(requests, 512, now=3.0) == Shares({"d": 1, "early": 300, "late": 211}, 0)


def test_cake_puts_plain_prefill_before_restores() -> None:
    requests = [restore("early", 1.0, 300), plain("late", 2.0, 400), decode("d", 3.0)]
    # 512 - 1 - 400 = 111 are left for the restore, although it came first
    assert open_policy("cake").share(requests, 512, now=3.0) == Shares({"d": 1, "late": 400, "early": 111}, 0)


def test_a_restore_advances_by_io_alone_when_plain_prefill_needs_every_token() -> None:
    requests = [restore("r", 0.0, 4000, load_s={0: 1e-4}), plain("p", 1.0, 4000), decode("d")]
    policy = open_policy("cake")
    assert policy.share(requests, 512, now=1.0) == Shares({"d": 1, "p": 511}, 0)
    assert [request.request_id for request in policy.load_order(requests, 0, now=1.0)] == ["r"]


def test_a_token_is_held_back_for_a_restore_that_waits_unadmitted() -> None:
    requests = [restore("r", 0.0, 4000, admitted=False), plain("p", 1.0, 4000), decode("d")]
    # Without it the engine would not come to its waiting requests, and the loads would not begin: 512 - 1 - 1 = 510.
    for name in ("fcfs", "cake", "marginal_saving"):
        assert open_policy(name).share(requests, 512, now=1.0) == Shares({"d": 1, "p": 510}, 1)


def test_decodes_do_without_the_held_back_token_only_if_one_is_left() -> None:
    requests = [restore("r", 0.0, 10, admitted=False), decode("a"), decode("b")]
    assert open_policy("cake").share(requests, 2, now=0.0) == Shares({"a": 1, "b": 1}, 0)
    assert open_policy("cake").share(requests, 3, now=0.0) == Shares({"a": 1, "b": 1}, 1)


def test_io_goes_to_the_longer_prefix() -> None:
    # A token costs 0.1 ms plus 0.01 µs per position before it, and 0.2 ms to load.
    # At 4,000: 0.10 + 0.04 = 0.14 ms; a second of I/O loads 5,000 tokens and spares 0.70 s.
    # At 32,000: 0.10 + 0.32 = 0.42 ms; it spares 2.10 s, three times as much.
    short = restore("short", 0.0, 4000, front_s=1e-4, back_s=1.4e-4, load_s={0: 2e-4})
    long = restore("long", 1.0, 32000, front_s=1e-4, back_s=4.2e-4, load_s={0: 2e-4})
    order = open_policy("marginal_saving").load_order([short, long], 0, now=1.0)
    assert [request.request_id for request in order] == ["long", "short"]
    assert [r.request_id for r in open_policy("fcfs").load_order([short, long], 0, now=1.0)] == ["short", "long"]


def test_io_goes_where_the_tier_is_faster() -> None:
    # Equal prefixes; 0.3 ms of compute per token spared. 0.1 ms to load: 3 s per second. 0.6 ms: half a second.
    slow = restore("slow", 0.0, 8000, front_s=1e-4, back_s=3e-4, load_s={0: 6e-4})
    fast = restore("fast", 1.0, 8000, front_s=1e-4, back_s=3e-4, load_s={0: 1e-4})
    order = open_policy("marginal_saving").load_order([slow, fast], 0, now=1.0)
    assert [request.request_id for request in order] == ["fast", "slow"]


def test_compute_goes_where_io_is_slow_then_to_the_shortest() -> None:
    # A second of compute covers 10,000 tokens: with 0.6 ms each that spares 6 s of I/O, with 0.1 ms one.
    slow = restore("slow", 2.0, 8000, front_s=1e-4, back_s=3e-4, load_s={0: 6e-4})
    fast = restore("fast", 0.0, 8000, front_s=1e-4, back_s=3e-4, load_s={0: 1e-4})
    short = restore("short", 1.0, 500, front_s=1e-4, back_s=3e-4, load_s={0: 1e-4})
    order = open_policy("marginal_saving").compute_order([fast, short, slow], now=2.0)
    assert [request.request_id for request in order] == ["slow", "short", "fast"]


def test_a_restore_with_nothing_left_to_load_is_computed_first() -> None:
    suffix = restore("suffix", 1.0, 600, front_s=1e-4, back_s=3e-4)
    other = restore("other", 0.0, 100, front_s=1e-4, back_s=3e-4, load_s={0: 1.0})
    order = open_policy("marginal_saving").compute_order([other, suffix], now=1.0)
    assert [request.request_id for request in order] == ["suffix", "other"]


def test_a_request_past_the_bound_is_moved_up_behind_the_decodes() -> None:
    requests = [restore("old", 0.0, 400), plain("new", 9.5, 400), decode("d", 9.9)]
    policy = open_policy("cake", starvation_s=10.0)
    # at 9.9 s it is not yet 10 s old: 512 - 1 - 400 = 111; at 10 s it is
    assert policy.share(requests, 512, now=9.9).tokens == {"d": 1, "new": 400, "old": 111}
    assert policy.share(requests, 512, now=10.0).tokens == {"d": 1, "old": 400, "new": 111}


@pytest.mark.parametrize(
    ("loads", "costs", "overdue_s"),
    [
        ({0: 2e-3}, 9e-3, 16.0),  # 8,000 tokens in 16 s by loading alone
        ({0: 2e-3, 1: 6e-3}, 9e-3, 12.0),  # 1 / (500 + 167) s per token
        ({0: 9e3}, 2e-3, 16.0),  # a tier that hardly delivers: 16 s by computing alone
        ({0: 1e-3}, 9e-3, 10.0),  # 8 s: it is past the bound only
        ({}, 2e-3, 10.0),  # nothing to load: it does not advance while it is passed over
    ],
)
def test_a_restore_may_be_passed_over_while_io_brings_it_on(
    loads: dict[int, float], costs: float, overdue_s: float
) -> None:
    old = restore("old", 0.0, 256, prefix_tokens=8000, front_s=costs / 2, back_s=costs * 3 / 2, load_s=loads)
    policy = open_policy("cake", starvation_s=10.0)
    for now, first in ((overdue_s - 0.1, "new"), (overdue_s + 0.1, "old")):
        assert policy.compute_order([old, plain("new", 5.0, 400)], now=now)[0].request_id == first


def test_restores_give_way_to_decodes_while_io_brings_them_on_nearly_as_well() -> None:
    # 4,000 tokens: 8 s by computing alone, by loading alone 4 s and 40 s.
    fast = restore("fast", 0.0, 400, prefix_tokens=4000, front_s=1e-3, back_s=3e-3, load_s={0: 1e-3})
    slow = restore("slow", 1.0, 400, prefix_tokens=4000, front_s=1e-3, back_s=3e-3, load_s={0: 1e-2})
    policy = open_policy("cake", starvation_s=10.0)
    alike = [fast, fast._replace(request_id="other", arrived_s=0.5), decode("d")]
    assert policy.share(alike, 512, 2.0, beside_decodes=30).tokens == {"d": 1, "fast": 30}
    assert policy.share(alike[:2], 512, 2.0, beside_decodes=30).tokens == {"fast": 400, "other": 112}
    assert policy.share([slow, fast, decode("d")], 1024, 2.0, 30).tokens == {"d": 1, "fast": 30, "slow": 400}
    assert policy.share([plain("p", 0.0, 10), fast, decode("d")], 512, 2.0, 30).tokens == {"d": 1, "p": 10, "fast": 20}
    assert policy.share([plain("p", 0.0, 400), decode("d")], 512, 2.0, 30).tokens == {"d": 1, "p": 400}
    assert policy.share([fast, decode("d")], 512, 2.0, beside_decodes=0).tokens == {"d": 1}
    # After 10 s it is served before all that came later, but decodes still do not wait for it.
    late = [plain("p", 9.0, 500), fast, decode("d")]  # the other prefill makes the step long enough by itself
    assert policy.share(late, 512, 9.9, beside_decodes=30).tokens == {"d": 1, "p": 500}
    assert policy.share(late, 512, 10.0, beside_decodes=30).tokens == {"d": 1, "fast": 30, "p": 481}


def test_what_io_cannot_bring_on_does_not_give_way() -> None:
    costs = {"prefix_tokens": 4000, "front_s": 1e-3, "back_s": 3e-3}
    policy = open_policy("cake", starvation_s=10.0)
    for load_s in ({}, {0: 0.0}):  # nothing left to load; a tier of which nothing is known
        request = restore("r", 0.0, 400, load_s=load_s, **costs)
        assert policy.share([request, decode("d")], 512, 2.0, beside_decodes=30).tokens == {"d": 1, "r": 400}


def test_loads_are_moved_up_as_well() -> None:
    old = restore("old", 0.0, 400, front_s=1e-4, back_s=1e-4, load_s={0: 1e-3})
    new = restore("new", 5.0, 400, front_s=1e-4, back_s=9e-4, load_s={0: 1e-3})
    policy = open_policy("marginal_saving", starvation_s=10.0)
    assert [request.request_id for request in policy.load_order([old, new], 0, now=9.9)] == ["new", "old"]
    assert [request.request_id for request in policy.load_order([old, new], 0, now=10.0)] == ["old", "new"]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="there is no priority policy 'best'"):
        open_policy("best")
    with pytest.raises(BadInput, match="starvation_s is -1"):
        open_policy("cake", starvation_s=-1)
    with pytest.raises(BadInput, match="starvation_s is nan"):
        open_policy("cake", starvation_s=float("nan"))
