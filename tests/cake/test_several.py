"""Several requests at once: each gets what it gets alone, in the order of the policy."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.embedded.arbiter import Arbiter, Request
from cakekv.engine.transformers import TransformersEngine
from cakekv.keys import ChunkKey, chunk_keys
from cakekv.load import pieces
from cakekv.restore.priority import POLICIES, RequestState, open_policy
from tests.cake.crowd import CHUNK, WAIT_S, Watched, asking, filled, nothing_left, slow, start, tokens, until


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_each_gets_what_it_gets_alone(engine: TransformersEngine, watched: Watched, policy: str) -> None:
    prompts = [tokens(seed, length) for seed, length in enumerate((325, 500, 90, 330, 17, 260))]
    alone = [Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
    store = filled(engine, prompts[0], prompts[1], prompts[3])
    jobs = [(number, mode) for mode in ("auto", "both", "load", "compute") for number in range(len(prompts))]
    options: Any = {"max_span_tokens": 64, "policy": policy, "save_answers": False}
    with Cake(watched, store=store, chunk_tokens=CHUNK, **options) as cake:

        def answer(job: tuple[int, Any]) -> list[int]:
            number, mode = job
            got = cake.generate(prompts[number], max_new_tokens=8, mode=mode)
            assert got.report.computed_tokens + got.report.loaded_tokens == len(prompts[number])
            assert got.report.recomputed_tokens == 0
            return got.token_ids

        with nothing_left(cake, watched):
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(answer, jobs))
            cake.wait_saved()
    assert answers == [alone[number] for number, _ in jobs]
    assert store.most_at_once <= store.parallel_reads


@pytest.mark.parametrize(
    ("policy", "starvation_s", "expected"),
    [
        ("fcfs", 60.0, ["stored", "plain"]),
        ("cake", 60.0, ["stored", "plain", "stored"]),
        ("marginal_saving", 60.0, ["stored", "plain", "stored"]),
        ("cake", 0.0, ["stored", "plain"]),
    ],
)
def test_a_plain_prefill_waits_for_one_span_of_a_restore(
    engine: TransformersEngine,
    watched: Watched,
    prompt: list[int],
    policy: str,
    starvation_s: float,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless requests go by arrival: the policy says so, or the older one is past the bound."""
    store = filled(engine, prompt)
    other = tokens(1, 200)
    chosen = open_policy(policy, starvation_s)
    monkeypatch.setattr(RequestState, "patience_s", 0.0)  # it depends on what the machine costs
    with Cake(watched, store=store, chunk_tokens=CHUNK, max_span_tokens=32, policy=chosen) as cake:
        slow(cake)
        plain: list[Future[Any]] = []

        def before(name: str, first: int, count: int) -> None:
            if first == 64 and name == "stored":  # in its second span or so
                plain.append(start("plain", lambda: cake.prefill(other, save=False)))
                until(lambda: asking(cake) == 2)
            if first + count == len(prompt):
                reads.set()

        def take(arbiter: Arbiter, request: Request) -> None:
            request.woken.wait(0.01)  # long enough for another one to come in between, if it may
            original(arbiter, request)

        original = Arbiter.take
        monkeypatch.setattr(Arbiter, "take", take)
        reads = threading.Event()
        store.before_open = lambda key: reads.wait(WAIT_S) and None
        watched.before = before
        with nothing_left(cake, watched):
            stored = start("stored", lambda: cake.prefill(prompt, mode="both", save=False))
            assert stored.result(WAIT_S).report.loaded_tokens == 0
            plain[0].result(WAIT_S)
    assert watched.turns() == expected
    assert sum(1 for name, _, _ in watched.spans if name == "plain") >= 6
    assert sum(1 for name, _, _ in watched.spans if name == "stored") >= 10


def test_decodes_and_spans_alternate(engine: TransformersEngine, watched: Watched) -> None:
    """A prefill neither waits for the end of a generation, nor holds up a step by more than a span."""
    watched.stop_tokens = frozenset()
    with Cake(watched, chunk_tokens=CHUNK, max_span_tokens=32) as cake:
        first: threading.Event = threading.Event()
        second: list[Future[Any]] = []

        def before(name: str, position: int, count: int) -> None:
            if name == "decode" and position == 52:
                second.append(start("prefill", lambda: cake.prefill(tokens(2, 300))))
                until(lambda: asking(cake) == 2)
            elif name == "decode" and position > 52:
                until(lambda: second[0].done() or asking(cake) == 2)
            elif name == "prefill":
                until(lambda: first.is_set() or asking(cake) == 2)

        watched.before = before
        decode = start("decode", lambda: cake.generate(tokens(3, 50), max_new_tokens=30))
        decode.add_done_callback(lambda _: first.set())
        decode.result(WAIT_S)
        second[0].result(WAIT_S)
    begin = watched.spans.index(("decode", 52, 1))
    spans = [name for name, *_ in watched.spans[begin:]]
    end = len(spans) - spans[::-1].index("prefill")
    assert spans[:end] == ["decode", "prefill"] * (end // 2)


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "short"), ("cake", "short"), ("marginal_saving", "long")])
def test_a_tier_serves_in_the_order_of_the_policy(
    engine: TransformersEngine, watched: Watched, policy: str, first: str
) -> None:
    """A long restore's last chunks save most compute."""
    short, long = tokens(4, 6 * CHUNK + 3), tokens(5, 30 * CHUNK + 3)
    store = filled(engine, short, long)
    store.parallel_reads = 1
    with Cake(watched, store=store, chunk_tokens=CHUNK, policy=policy) as cake:
        keys = {key: name for name, ids in (("short", short), ("long", long)) for key in chunk_keys(cake.identity, ids)}
        others: list[Future[Any]] = []

        def before_open(key: ChunkKey) -> None:
            if len(store.opened) == 1:
                others.append(start("long", lambda: cake.prefill(long, mode="load")))
                until(lambda: len(cake._arms.loader._open) == 2)

        store.before_open = before_open
        loaded = [cake.prefill(short, mode="load").report.loaded_tokens]
        loaded.append(others[0].result(WAIT_S).report.loaded_tokens)
    assert loaded == [6 * CHUNK, 30 * CHUNK]
    assert store.most_at_once == 1
    whose = [keys[key] for key in store.opened]
    assert whose[0] == "short"
    if first == "short":
        assert whose == ["short"] * 6 + ["long"] * 30
    else:
        # Down to where the short one stands (its first load brought it to chunk 5), the long one's save more.
        assert whose[1:25] == ["long"] * 24
        assert whose.count("short") == 6


def test_others_compute_while_a_suffix_waits_for_its_layers(
    engine: TransformersEngine, watched: Watched, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_LEAST_READ_BYTES", 1)
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=4)
    store = filled(engine, prompt)
    reads = threading.Event()
    store.before_open = lambda key: reads.wait(WAIT_S) and None
    with Cake(watched, store=store, chunk_tokens=CHUNK) as cake, nothing_left(cake, watched):
        cake.compute_cost.observe(0, 128, 1e4)  # so dear that everything is loaded,
        cake.load_costs[0].observe(16_000, 0.0, 5.0)  # and long enough for a layered finish
        waits = start("waits", lambda: cake.generate(prompt, max_new_tokens=4, save=False))
        until(lambda: watched.spans == [("waits", 320, 5)] and asking(cake) == 0)
        assert len(cake.generate(tokens(16, 100), max_new_tokens=4, save=False).token_ids) == 4
        assert not waits.done()
        reads.set()
        answer = waits.result(WAIT_S)
    assert answer.token_ids == expected.token_ids
    assert any(load.group is not None for load in answer.report.loads)
    assert cake.compute_cost.seconds(320, 5) > 1e-3
