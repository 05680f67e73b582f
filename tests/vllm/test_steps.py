"""A step of the scheduler costs what has changed, not what waits: counted in calls, since times depend on machines."""

from __future__ import annotations

import cProfile
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_steps import OWN_TOKENS, LoneScheduler, Scenario, fill
from cakekv.keys import ChunkKey
from cakekv.store.memory import MemoryStore
from cakekv.vllm.scheduling import admission
from cakekv.vllm.scheduling.admission import MOST_BEGUN
from cakekv.vllm.scheduling.lookup import BackgroundLookup
from cakekv.vllm.shard_key import shard_key


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Callable[[Scenario], LoneScheduler]]:
    made: list[LoneScheduler] = []

    def make(scenario: Scenario) -> LoneScheduler:
        made.append(LoneScheduler(tmp_path / f"{len(made)}", scenario))
        fill(made[-1], scenario)
        return made[-1]

    yield make
    for each in made:
        each.close()


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Counter[str]) -> None:
    """Count the calls of a method."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def calls_of(lone: LoneScheduler, steps: int) -> int:
    """Calls of Python's functions in so many steps."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        lone.step()
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


def test_requests_with_one_prefix_are_looked_up_once(
    lone: Callable[[Scenario], LoneScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = lone(Scenario("", 60, 8192, 60, 0, same_prefix=True))
    calls: Counter[str] = Counter()
    counted(monkeypatch, twins.scheduler.kv_cache_manager, "get_computed_blocks", calls)
    steps = 0
    while len(twins.half.restorations) == 1 or not steps:
        twins.step()
        steps += 1
    assert steps > 3  # they waited for a while
    assert calls["get_computed_blocks"] <= 2 * MOST_BEGUN
    while len(twins.scheduler.running) < 60:
        twins.step()
        steps += 1
        assert steps < 200
    # Once for each, and once more for those that met the end of a step.
    assert calls["get_computed_blocks"] <= 60 + steps
    reports = dict(twins.half.outcomes.latest)
    assert reports.pop("request 0").loaded_tokens > 2048
    assert all(report.loaded_tokens < OWN_TOKENS for report in reports.values())  # what is their own


def test_vllm_looks_at_none_that_waits_for_another(
    lone: Callable[[Scenario], LoneScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.request import RequestStatus

    twins = lone(Scenario("", 30, 8192, 60, 0, same_prefix=True))
    twins.step()
    scheduler = twins.scheduler
    waiting = [request.request_id for request in scheduler.waiting]
    assert len(waiting) == 29
    counts: list[tuple[int, int]] = []
    orders = twins.half.orders

    def counting(output: Any) -> Any:
        counts.append(scheduler.get_request_counts())
        return orders(output)

    monkeypatch.setattr(twins.half, "orders", counting)
    calls: Counter[str] = Counter()
    counted(monkeypatch, scheduler, "_handle_blocked_waiting_request", calls)
    twins.add("another", [3] * 600)
    twins.answered()
    twins.step()
    assert calls["_handle_blocked_waiting_request"] <= 2  # the restore itself, and the one that is new
    assert [request.request_id for request in scheduler.waiting][:29] == waiting
    assert sum(counts[0]) == sum(scheduler.get_request_counts()) == 31
    assert set(scheduler.waiting) <= scheduler.deferred_waiting
    scheduler.finish_requests(waiting[3], RequestStatus.FINISHED_ABORTED)
    assert waiting[3] not in [request.request_id for request in scheduler.waiting]
    while len(scheduler.running) < 30:
        twins.step()
        assert len(twins.times_s) < 300
    assert not scheduler.waiting


def test_requests_with_other_prefixes_do_not_wait_for_each_other(
    lone: Callable[[Scenario], LoneScheduler],
) -> None:
    others = lone(Scenario("", MOST_BEGUN + 4, 8192, 30, 0))
    others.step()
    assert len(others.half.restorations) == MOST_BEGUN
    others.step()
    assert len(others.half.restorations) == MOST_BEGUN + 4


def test_a_request_that_shares_only_what_is_computed_already_does_not_wait(
    lone: Callable[[Scenario], LoneScheduler],
) -> None:
    """Its own tail is not what the other restores, so it can begin with that."""
    first = lone(Scenario("", 1, 32768, 4, 0))
    tokens = list(first.scheduler.requests["request 0"].prompt_token_ids)
    first.step()
    restoration = first.half.restorations["request 0"]
    while restoration.position < 1024:
        first.step()
    first.step()  # what it computed is in vLLM's cache now
    first.add("half a twin", tokens[:512] + [7] * 8192)
    first.add("twin", tokens[:16384] + [8] * 8192)
    first.answered()
    first.step()
    assert not restoration.joined
    assert set(first.half.restorations) == {"request 0", "half a twin"}


def test_no_more_restores_begin_than_are_of_use(
    lone: Callable[[Scenario], LoneScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MOST_OPEN", 12)
    many = lone(Scenario("", 60, 2048, 60, 0))
    most = 0
    while any(request.num_computed_tokens < request.num_tokens - 1 for request in many.scheduler.requests.values()):
        many.step()
        most = max(most, len(many.half.restorations))
        assert len(many.times_s) < 2000
    assert most == 12
    assert sum(report.loaded_tokens > 0 for _, report in many.half.outcomes.latest) > 0


@pytest.mark.parametrize("same_prefix", [True, False], ids=["same prefix", "others"])
def test_work_grows_no_faster_than_the_requests(lone: Callable[[Scenario], LoneScheduler], same_prefix: bool) -> None:
    few, many = (
        calls_of(lone(Scenario("", count, 2048, count, 4, same_prefix=same_prefix)), 12) for count in (50, 400)
    )
    assert many < 1.2 * 8 * few


def test_states_and_reservations_are_made_once_a_step(
    lone: Callable[[Scenario], LoneScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = lone(Scenario("", 100, 4096, 100, 4))
    calls: Counter[str] = Counter()
    counted(monkeypatch, many.half, "_state", calls)
    counted(monkeypatch, many.scheduler, "_request_remaining_blocks", calls)
    for _ in range(20):
        open_before = len(many.half.restorations)
        calls.clear()
        many.step()
        assert calls["_state"] <= open_before + MOST_BEGUN
        assert calls["_request_remaining_blocks"] <= len(many.scheduler._inflight_prefills) + MOST_BEGUN


def test_a_waiting_adapter_counts_the_running_ones_once(lone: Callable[[Scenario], LoneScheduler]) -> None:
    """However many requests wait, the adapters of those that run are listed once per change."""
    from types import SimpleNamespace

    one = lone(Scenario("", 1, 4096, 1, 8))
    scheduler = one.scheduler
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    request = SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=2))
    assert scheduler._has_room_for_adapter(request)
    listed = scheduler._adapters[1]
    for _ in range(100):
        assert scheduler._has_room_for_adapter(request)
    assert scheduler._adapters[1] is listed


class SlowlyRead(list[int | None]):
    """An answer that takes its time to be read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, index: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(60)
        return super().__getitem__(index)


def test_reading_a_long_answer_keeps_nobody_waiting() -> None:
    found = SlowlyRead([100] * 8)

    class Tier(MemoryStore):
        def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
            return found

    lookup = BackgroundLookup([Tier()], [partial(shard_key, tag="0 of 1")], 100, 1e9)
    lookup.ask("first", [ChunkKey(os.urandom(32)) for _ in range(8)], range(0))
    assert found.begun.wait(60)
    done = threading.Event()

    def as_the_scheduler_does() -> None:
        assert lookup.answer("first") is None
        lookup.ask("second", [], range(0))
        lookup.forget("second")
        done.set()

    threading.Thread(target=as_the_scheduler_does, daemon=True).start()
    assert done.wait(60)
    found.go_on.set()
    while lookup.answer("first") is None:
        pass
    assert lookup.answer("first") == [(0,)] * 8
    lookup.close()
