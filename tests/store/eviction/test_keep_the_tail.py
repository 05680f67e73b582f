"""What keep-the-tail learns of prompts and their returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cakekv.restore.costs import ComputeShape
from cakekv.store.eviction.base import Held
from cakekv.store.eviction.keep_the_tail import KeepTheTail
from cakekv.store.eviction.prompts_seen import PromptsSeen
from cakekv.store.eviction.return_rates import ReturnRates

from ..chunks import key_of

NOW = 1e9


def chunk_at(number: Any, position: Any) -> Any:
    return Held(key_of(number), 1, NOW, position, 1)


def serve(policy: Any, prompts: Any, loaded: Any, pause: float = 60.0) -> Any:
    """Prompts of ten chunks, each asked for again once; of the second time, `loaded` chunks are read."""
    for prompt in range(prompts):
        keys = [key_of((prompt, chunk)) for chunk in range(10)]
        now = NOW + prompt * 2 * pause
        policy.asked(keys, now)
        for key in keys:
            policy.wrote(Held(key, 1000, now, 512, 512))  # all of one price
        now += pause
        policy.asked(keys, now)
        for chunk in loaded:
            policy.read(keys[chunk], now)
        while len(policy) > 20:
            policy.evict(now)
    keys = [key_of(("last", chunk)) for chunk in range(10)]
    policy.asked(keys, now)
    for key in reversed(keys):
        policy.wrote(Held(key, 1000, now, 512, 512))
    return keys, now


@pytest.mark.parametrize("loaded", [range(6, 10), range(2, 10), [0, 1]])
def test_parts_of_prompts_that_are_not_read_go_first(loaded: Sequence[int]) -> None:
    """Those at the end of what compute covers, wherever that is; here no part costs more to compute than another."""
    policy = KeepTheTail()
    keys, now = serve(policy, 200, loaded)
    last = {key: chunk for chunk, key in enumerate(keys)}
    order = []
    while (chunk := policy.evict(now + 5)) is not None:
        if chunk.key in last:
            order.append(last[chunk.key])
    unread = set(range(10)) - set(loaded)
    assert set(order[: len(unread)]) == unread


def test_chunks_that_nobody_looked_up_go_by_position() -> None:
    policy = KeepTheTail(ComputeShape(0.0, 1.0, 0.0))
    for number in range(600):
        head, tail = chunk_at((number, 0), 0), chunk_at((number, 1), 8192)
        for chunk in (head, tail):
            policy.wrote(chunk)
        policy.read(tail.key, NOW + 60)
        while len(policy) > 20:
            policy.evict(NOW + 60)
    policy.wrote(chunk_at("tail", 8000))
    policy.wrote(chunk_at("head", 0))
    tail, head = policy.get(key_of("tail")), policy.get(key_of("head"))
    assert tail is not None
    assert head is not None
    assert policy.worth(tail, NOW + 60) > 2 * policy.worth(head, NOW + 60)


def test_rates_tell_classes_apart_although_one_is_evicted_young() -> None:
    """Judged by returns alone, what is evicted before anybody could come back would seem not to be wanted."""
    rates = ReturnRates(kinds=1)
    for _ in range(4000):
        rates.observe(100.0, (0,), returned=True)  # of class 0, all come back after 100 s
        rates.observe(1.0, (1,), returned=False)  # class 1 has always gone by then
        rates.observe(200.0, (2,), returned=False)  # class 2 is not wanted
    assert rates.rate(10.0, (0,)) > 5 * rates.rate(10.0, (2,))
    assert rates.rate(10.0, (1,)) > 5 * rates.rate(10.0, (2,))


def test_a_chunk_is_worth_waiting_for_until_its_time_has_passed() -> None:
    rates = ReturnRates(kinds=1)
    for step in range(4000):
        rates.observe(60.0 + step % 60, (0,), returned=step % 4 == 0)
        rates.observe(400.0 + step % 100, (0,), returned=False)
    assert rates.rate(50.0, (0,)) > rates.rate(5.0, (0,)) > rates.rate(200.0, (0,))
    assert rates.rate(5.0, (7,)) == pytest.approx(rates.rate(5.0, (0,))), "of a class never seen nothing is assumed"


def test_only_chunks_with_everything_behind_them_tell_what_is_needed() -> None:
    """With a hole in the tail, more of the head is read in its place."""
    seen = PromptsSeen()
    for prompt in range(300):
        keys = [key_of((prompt, chunk)) for chunk in range(20)]
        seen.asked(keys, [False] * 20)
        seen.asked(keys, [chunk not in (12, 19) for chunk in range(20)])  # the last one was never stored
        for chunk in (3, 17, 18):
            seen.read(keys[chunk])
    needed = [seen.needed(part) for part in range(20)]
    assert needed[:13] == [1.0] * 13, "nothing is known of what is before the hole"
    assert max(needed[13:17]) < 0.1
    assert needed[17:] == [1.0] * 3


def test_turns_of_a_conversation_are_counted_and_a_shared_beginning_is_none() -> None:
    seen = PromptsSeen()
    system = [key_of(("system", chunk)) for chunk in range(3)]
    for user in range(3):
        first = [*system, *(key_of((user, chunk)) for chunk in range(5))]
        second = [*first, key_of((user, 5)), key_of((user, 6))]
        seen.asked(first, [False] * 8)
        seen.asked(second, [False] * 10)
        turns = [seen.place(key).turn for key in second]
        assert set(turns) == {3 if user else 2}, "those who come after the first go on from the system prompt"
        assert [seen.place(key).part for key in second] == list(range(0, 20, 2))
