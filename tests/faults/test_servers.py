"""A server killed, and a link cut, in the middle of a restore: the answer is right, and afterwards all is as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from cakekv.bench.link import ShapedLink
from cakekv.bench.servers import VALKEY_PORT, valkey_behind
from cakekv.cake import Cake, Progress
from cakekv.errors import CakeError
from cakekv.store.opening import open_store
from cakekv.store.redis import RedisStore
from tests.store.servers import valkey

CHUNK, CHUNKS = 16, 20
NEW_TOKENS = 6


@pytest.fixture
def expected(engine: Any, prompt: list[int]) -> list[int]:
    return Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=NEW_TOKENS).token_ids


def cake_on(engine: Any, store: Any, **options: Any) -> Cake:
    return Cake(engine, store=store, chunk_tokens=CHUNK, max_span_tokens=CHUNK, **options)


def answer(cake: Cake, prompt: list[int], **options: Any) -> Any:
    return cake.generate(prompt, max_new_tokens=NEW_TOKENS, **options)


class OnceLoaded:
    """Does something once, as soon as so many chunks have been loaded."""

    def __init__(self, chunks: int, action: Any) -> None:
        self._tokens = chunks * CHUNK
        self._action = action
        self.done = False

    def __call__(self, progress: Progress) -> None:
        loaded = sum(end - start for start, end, state in progress.bands if state == "loaded")
        if loaded >= self._tokens and not self.done:
            self.done = True
            self._action()


@pytest.mark.parametrize("mode", ["load", "both"])
@pytest.mark.parametrize("persistent", [False, True], ids=["forgetful", "persistent"])
def test_a_server_killed_and_started_again(
    engine: Any, prompt: list[int], expected: list[int], tmp_path: Path, persistent: bool, mode: Any
) -> None:
    options = ["--appendonly", "yes"] if persistent else []
    with ExitStack() as stack:
        port, process = stack.enter_context(valkey(tmp_path, *options))
        store = stack.enter_context(RedisStore("127.0.0.1", port, timeout_s=5))
        with cake_on(engine, store) as cake:
            cake.prefill(prompt)
            cake.wait_saved()
            assert answer(cake, prompt, mode="load").report.loaded_tokens == CHUNKS * CHUNK

            def kill_and_start() -> None:
                process.kill()
                process.wait()
                stack.enter_context(valkey(tmp_path, *options, port=port))

            trouble = OnceLoaded(2, kill_and_start)
            restored = answer(cake, prompt, mode=mode, on_progress=trouble)
            assert trouble.done, "nothing was loaded: no test of that"
            assert restored.token_ids == expected
            if mode == "load" and not persistent:
                assert restored.report.recomputed_tokens > 0, "the kill cost nothing: no test of that"
            saved = cake.wait_saved()
            again = answer(cake, prompt, mode="load")
            assert again.token_ids == expected
            assert not any("corrupt" in reason for reason in again.report.miss_reasons())
            if persistent:
                assert again.report.loaded_tokens == CHUNKS * CHUNK
            else:
                assert again.report.loaded_tokens < CHUNKS * CHUNK
                assert answer(cake, prompt, mode="load").report.loaded_tokens >= 0
                cake.wait_saved()
                assert answer(cake, prompt, mode="load").report.loaded_tokens == CHUNKS * CHUNK, saved


@pytest.fixture
def link() -> Iterator[ShapedLink]:
    try:
        with ShapedLink() as made:
            yield made
    except CakeError as error:
        pytest.skip(str(error))


@pytest.fixture
def cut_s(long: bool) -> float:
    return 5.0 if long else 2.0


def cut_for_a_while(link: ShapedLink, seconds: float) -> threading.Timer:
    link.cut()
    timer = threading.Timer(seconds, link.mend)
    timer.start()
    return timer


@pytest.mark.parametrize("mode", ["load", "auto"])
def test_a_link_cut_for_seconds(
    engine: Any, prompt: list[int], expected: list[int], link: ShapedLink, cut_s: float, mode: Any
) -> None:
    timers: list[threading.Timer] = []
    with valkey_behind(link), RedisStore(link.far_address, VALKEY_PORT, timeout_s=3) as store:
        link.set_bandwidth(2e6)
        with cake_on(engine, store, deadline_s=1.0) as cake:
            cake.prefill(prompt)
            cake.wait_saved()
            assert answer(cake, prompt, mode="load").report.loaded_tokens == CHUNKS * CHUNK
            trouble = OnceLoaded(3, lambda: timers.append(cut_for_a_while(link, cut_s)))
            restored = answer(cake, prompt, mode=mode, save=False, on_progress=trouble)
            assert trouble.done, "nothing was loaded: no test of that"
            assert restored.token_ids == expected
            assert restored.report.loaded_tokens < CHUNKS * CHUNK, "the cut cost nothing: no test of that"
            during = 0
            while timers[0].is_alive():
                asked = answer(cake, prompt, mode=mode, save=False)
                assert asked.token_ids == expected
                during += 1
            assert during or cut_s < 5, "requests are served while the link is cut"
            until = monotonic() + 60
            while answer(cake, prompt, mode="load", save=False).report.loaded_tokens != CHUNKS * CHUNK:
                assert monotonic() < until
                sleep(0.1)


def test_a_tier_behind_a_link_that_is_cut(
    engine: Any, prompt: list[int], expected: list[int], link: ShapedLink, cut_s: float, tmp_path: Path, caplog: Any
) -> None:
    """In a tiered store the tier goes down and comes back, and the others go on."""
    caplog.set_level("INFO", logger="cakekv")
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://?capacity=100kB"
        [[tier]]
        url = "redis://{link.far_address}:{VALKEY_PORT}?timeout=2s"
        deadline = "200ms"
    """)
    with (
        valkey_behind(link),
        open_store(f"tiered://{tmp_path}/kv.toml") as store,
        cake_on(engine, store, deadline_s=1.0) as cake,
    ):
        cake.prefill(prompt)
        cake.wait_saved()
        assert answer(cake, prompt, mode="load").report.loaded_tokens == CHUNKS * CHUNK
        timer = cut_for_a_while(link, cut_s)
        fewest = CHUNKS * CHUNK
        while timer.is_alive():
            asked = answer(cake, prompt, mode="load", save=False)
            assert asked.token_ids == expected
            fewest = min(fewest, asked.report.loaded_tokens)
        assert 0 < fewest < CHUNKS * CHUNK, "from memory only"
        until = monotonic() + 60
        while answer(cake, prompt, mode="load", save=False).report.loaded_tokens != CHUNKS * CHUNK:
            assert monotonic() < until
            sleep(0.1)
    logged = [record.event for record in caplog.records if record.event in ("tier_down", "tier_up")]
    assert logged[0] == "tier_down"
    assert logged[-1] == "tier_up"
