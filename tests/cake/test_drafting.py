"""Prompts of which the upper parts are loaded first: an answer is drafted from them, and verified once all is there."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import MissingChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.results import Generation
from cakekv.store.base import ChunkReader, Store
from cakekv.store.memory import MemoryStore
from cakekv.store.throttled import ThrottledStore
from cakekv.store.wrapper import WrappedReader, WrappedStore
from tests.cake.test_asyncio import Letters, is_idle, until
from tests.matrix.models import build

CHUNK = 64
CODEC = "two_plane:group=16"
CHUNKS = 5 * CHUNK


class SecondTime(WrappedStore):
    """Something happens to everything that is opened for the second time: what is left of chunks."""

    def __init__(self, inner: Store, happens: Callable[[ChunkReader], ChunkReader]) -> None:
        super().__init__(inner)
        self.opened: Counter[ChunkKey] = Counter()
        self._happens = happens

    def open(self, key: ChunkKey) -> ChunkReader:
        self.opened[key] += 1
        reader = super().open(key)
        return self._happens(reader) if self.opened[key] == 2 else reader


class Damaged(WrappedReader):
    def read_into(self, buffer: memoryview, offset: int) -> int:
        count = super().read_into(buffer, offset)
        buffer[:count] = bytes(255 - byte for byte in buffer[:count])
        return count


def gone(reader: ChunkReader) -> ChunkReader:
    raise MissingChunk("it is gone")


def broken(reader: ChunkReader) -> ChunkReader:
    raise StoreError("it is broken")


@pytest.fixture(scope="module")
def engine(engine: TransformersEngine) -> TransformersEngine:
    endless = TransformersEngine(engine.model)
    endless.stop_tokens = frozenset()
    return endless


def filled(engine: TransformersEngine, prompt: list[int]) -> MemoryStore:
    store = MemoryStore()
    with Cake(engine, store=store, chunk_tokens=CHUNK, codec=CODEC) as cake:
        cake.prefill(prompt)
    return store


@pytest.fixture(scope="module")
def store(engine: TransformersEngine, prompt: list[int]) -> MemoryStore:
    return filled(engine, prompt)


def cake_of(engine: TransformersEngine, store: Store, target: float, **options: Any) -> Cake:
    decode = "quantspec:gamma=4,group=16,recent=16"
    options = {"layered_finish": False, "decode": decode, "save_answers": False, **options}
    link = ThrottledStore(store, 1e6)  # where the bytes are what takes the time
    return Cake(engine, Letters(), link, chunk_tokens=CHUNK, codec=CODEC, ttft_target_s=target, **options)


def answer(engine: TransformersEngine, store: Store, prompt: list[int], target: float, **options: Any) -> Generation:
    with cake_of(engine, store, target, **options) as cake:
        return cake.generate(prompt, mode="load", save=False, max_new_tokens=30)


@pytest.mark.parametrize("layered", [False, True])
def test_upper_parts_first(engine: TransformersEngine, store: MemoryStore, prompt: list[int], layered: bool) -> None:
    """The answer is the one of all parts, every byte of which is read once."""
    patient = answer(engine, store, prompt, float("inf"), layered_finish=layered)
    hasty = answer(engine, store, prompt, 0.0, layered_finish=layered)
    assert hasty.token_ids == patient.token_ids
    one, other = patient.report, hasty.report
    assert one.level_tokens == other.level_tokens == {"2 of 2": CHUNKS}
    assert one.lossy_tokens == other.lossy_tokens == CHUNKS
    assert one.draft_s == 0
    assert 0 < other.draft_s < other.ttft_s
    first = [load for load in other.loads if load.parts == 1]
    rest = [load for load in other.loads if load.began_s >= max(load.ended_s for load in first)]
    assert sum(load.tokens for load in rest) == CHUNKS
    assert sum(load.bytes for load in rest) < 0.6 * sum(one.bytes_by_tier.values()), "upper parts are not read again"
    assert sum(other.bytes_by_tier.values()) < 1.3 * sum(one.bytes_by_tier.values()), "but for pages that both share"


def test_upper_parts_alone_answer_otherwise(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    """Else nothing would be tested here."""
    alone = answer(engine, store, prompt, 0.0, decode=None)
    assert alone.report.level_tokens == {"1 of 2": CHUNKS}
    assert alone.token_ids != answer(engine, store, prompt, 0.0).token_ids


@pytest.mark.parametrize("name", ["qwen2-mixed", "gemma2"])
def test_layers_with_windows(name: str, prompt: list[int]) -> None:
    engine = TransformersEngine(build(name))
    engine.stop_tokens = frozenset()
    short = [token % 128 for token in prompt[: 3 * CHUNK + 9]]
    store = filled(engine, short)
    hasty, patient = (answer(engine, store, short, target) for target in (0.0, float("inf")))
    assert hasty.token_ids == patient.token_ids
    assert hasty.report.level_tokens == patient.report.level_tokens


def test_a_prompt_that_is_stored_to_its_end(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    """Its last token's row is loaded, and computed again."""
    whole = prompt[:CHUNKS]
    hasty, patient = (answer(engine, store, whole, target) for target in (0.0, float("inf")))
    assert hasty.token_ids == patient.token_ids


@pytest.mark.parametrize(
    ("happens", "reason"),
    [(gone, "vanished from the store"), (broken, "store failed"), (Damaged, "corrupt")],
)
def test_what_cannot_be_read_is_computed(
    engine: TransformersEngine, store: MemoryStore, prompt: list[int], happens: Any, reason: str
) -> None:
    """The answer is then the one of a prompt whose chunks were all computed, and the report says why."""
    faulty = SecondTime(store, happens)
    given = answer(engine, faulty, prompt, 0.0).report
    assert given.level_tokens == {}
    assert given.loaded_tokens == given.lossy_tokens == 0
    assert given.recomputed_tokens == CHUNKS
    assert [miss.reason.partition(":")[0] for miss in given.misses if miss.start < CHUNKS] == [reason] * 5
    exact = answer(engine, MemoryStore(), prompt, 0.0)
    assert answer(engine, SecondTime(store, happens), prompt, 0.0).token_ids == exact.token_ids


def test_another_tier_delivers_the_rest(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    """What one tier has lost in the meantime, another still has; and a prefill alone is complete, too."""
    expected = answer(engine, store, prompt, float("inf"))
    tiers = [ThrottledStore(SecondTime(store, gone), 1e6), ThrottledStore(filled(engine, prompt), 1e5)]
    options: Any = {
        "codec": CODEC,
        "ttft_target_s": 0.0,
        "layered_finish": False,
        "decode": "quantspec:group=16,recent=16",
    }
    with Cake(engine, None, tiers, chunk_tokens=CHUNK, **options) as cake:
        prefill = cake.prefill(prompt, mode="load", save=False)
    assert prefill.report.level_tokens == {"2 of 2": CHUNKS}
    assert prefill.report.misses == [miss for miss in prefill.report.misses if miss.start >= CHUNKS]
    assert int(prefill.logits.argmax()) == expected.token_ids[0]


def test_two_at_once(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    expected = answer(engine, store, prompt, float("inf")).token_ids
    with cake_of(engine, store, 0.0) as cake, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(cake.generate, prompt, mode="load", save=False, max_new_tokens=30) for _ in range(2)]
        assert [one.result().token_ids for one in asked] == [expected] * 2


def test_a_tier_that_hangs(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    """It is waited for as long as the deadline says."""
    over = threading.Event()

    def hang(reader: ChunkReader) -> ChunkReader:
        over.wait(60)
        return reader

    try:
        given = answer(engine, SecondTime(store, hang), prompt, 0.0, deadline_s=1.0)
    finally:
        over.set()
    assert {miss.reason for miss in given.report.misses if miss.start < CHUNKS} == {"late"}
    assert given.token_ids == answer(engine, MemoryStore(), prompt, 0.0).token_ids


def test_cancelled_while_it_waits(engine: TransformersEngine, store: MemoryStore, prompt: list[int]) -> None:
    waits, over = threading.Event(), threading.Event()

    def hang(reader: ChunkReader) -> ChunkReader:
        waits.set()
        over.wait(60)
        return reader

    faulty = SecondTime(store, hang)
    with cake_of(engine, faulty, 0.0) as cake:

        async def main() -> None:
            task = asyncio.create_task(cake.agenerate(prompt, mode="load", save=False))
            await asyncio.to_thread(waits.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        over.set()
        until(lambda: is_idle(cake))
        again = cake.generate(prompt, mode="load", save=False, max_new_tokens=30)
    assert again.token_ids == answer(engine, store, prompt, 0.0).token_ids
