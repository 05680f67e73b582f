"""What requests ask of the stores: real requests of a real engine, over a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tiny_engine import TinyEngine, closing, prompt, sampling

from cakekv.keys import ChunkKey
from cakekv.restore.options import Mode
from cakekv.store.disk import DiskStore
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.tiered import TieredStore, TierPlan
from cakekv.vllm.scheduling.hints import WAITS_S, Hints
from cakekv.vllm.scheduling.request_options import RequestOptions

CHUNKS = 7


def own(mode: Mode = "auto", **hints: Any) -> RequestOptions:
    return RequestOptions(mode, True, False, **hints)


def asking(**hints: Any) -> Any:
    return sampling(extra_args={"kv_transfer_params": {"cakekv": hints}})


def key(number: int) -> ChunkKey:
    return ChunkKey(bytes([number]) * 32)


def test_a_request_pins_its_prompt_and_another_releases_it(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with closing(TinyEngine(model, {"store": str(folder)})) as engine:
        store = DiskStore(folder)
        engine.run(prompt(1000), asking(pin_s=600, prefetch=True, odd=1))
        engine.settle()
        assert engine.half.hints.flush(10.0)
        assert len(store.pins().keys) == CHUNKS
        assert {chunk.key for chunk in store} == store.pins().keys
        engine.run(prompt(1000), asking(release=True))
        assert engine.half.hints.flush(10.0)
        assert not store.pins().keys


def test_who_waits_is_fetched_for(tmp_path: Path) -> None:
    near, disk = MemoryStore(), DiskStore(tmp_path / "disk")
    for number in range(4):
        disk.write(key(number), memoryview(bytes(5000)))
    plan = [TierPlan(Member(lambda store=store: store, store.name)) for store in (near, disk)]  # type: ignore[misc]
    with TieredStore(plan) as tiered:
        hints = Hints(tiered, [lambda key: key], 100)
        waiting = {"a": [key(0)], "b": [key(1), key(2)]}
        hints.queue(["a", "b"], waiting.__getitem__, 0.0)
        assert hints.flush(10.0)
        tiered.flush()
        assert not near.stats().chunks, "most begin at once"
        hints.queue(["b"], waiting.__getitem__, WAITS_S)
        assert hints.flush(10.0)
        tiered.flush()
        assert sorted(chunk.key for chunk in near) == [key(1), key(2)]
        hints.close()


def test_a_store_that_hangs_is_waited_for_by_nobody() -> None:
    class Hanging(MemoryStore):
        def pin(self, *arguments: Any) -> None:
            time.sleep(60)

    hints = Hints(Hanging(), [lambda key: key], 100)
    began = time.monotonic()
    for number in range(100):
        hints.arrived(str(number), [key(number)], own(pin_s=5.0, release=True))
        hints.finished(str(number))
    assert not hints.flush(0.05)
    hints.close()
    assert time.monotonic() - began < 10
