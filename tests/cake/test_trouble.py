"""Bad input and bad luck: a clear error or a correct answer, and nothing lost."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cakekv.cake import Cake
from cakekv.chunk import verify_chunk
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store
from cakekv.store.disk import DiskStore
from cakekv.store.memory import MemoryStore

CHUNK = 16


@pytest.fixture
def disk(engine: TransformersEngine, prompt: list[int], tmp_path: Path) -> DiskStore:
    store = DiskStore(tmp_path / "kv")
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        cake.prefill(prompt)
    return store


def answer(engine: TransformersEngine, store: Store | None, prompt: list[int], mode: Any = "load") -> Any:
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        generation = cake.generate(prompt, max_new_tokens=8, mode=mode)
    return generation


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "empty"),
        ([1] * 1025, "1025"),
        ([1, 2, 211], "211"),
        ([1, -1], "-1"),
        ("text", "tokenizer"),
    ],
)
def test_bad_prompts_are_refused_with_the_reason(engine: TransformersEngine, bad: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Cake(engine, store=MemoryStore(), chunk_tokens=CHUNK).prefill(bad)


def test_bad_settings_are_refused_before_anything_is_computed(engine: TransformersEngine, prompt: list[int]) -> None:
    cake = Cake(engine, store=MemoryStore(), chunk_tokens=CHUNK)
    with pytest.raises(BadInput, match="auto, compute, load, both"):
        cake.prefill(prompt, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="temperature"):
        cake.generate(prompt, temperature=-1.0)
    with pytest.raises(BadInput, match="max_new_tokens"):
        cake.generate(prompt, max_new_tokens=0)
    with pytest.raises(BadInput, match="bandwidth"):
        Cake(engine, store="memory://?bandwidth=fast")
    with pytest.raises(BadInput, match="chunk_tokens"):
        Cake(engine, chunk_tokens=0)
    assert cake.wait_saved().saved_chunks == 0


def test_a_prompt_of_one_token(engine: TransformersEngine) -> None:
    store = MemoryStore()
    generation = answer(engine, store, [5], mode="auto")
    assert len(generation.token_ids) == 8
    assert generation.report.computed_tokens == 1


def bit_flip(data: bytearray) -> bytearray:
    data[random.Random(1).randrange(5000, len(data))] ^= 0x10
    return data


DAMAGE: dict[str, Callable[[bytearray], bytearray]] = {
    "bit flip": bit_flip,
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: bytearray(),
    "longer": lambda data: data + bytes(4096),
    "wrong bytes of the right length": lambda data: bytearray(random.Random(2).randbytes(len(data))),
    "hostile counts": lambda data: data[:8] + b"\xff" * 40 + data[48:],
    "another version": lambda data: data[:8] + b"\x63" + data[9:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("mode", ["load", "auto"])
def test_damaged_chunks_are_recomputed_counted_and_written_again(
    engine: TransformersEngine, prompt: list[int], disk: DiskStore, damage: str, mode: Any
) -> None:
    expected = answer(engine, None, prompt)
    files = sorted(disk.path.glob("chunks/*/*.chunk"))
    for file in files:
        data = DAMAGE[damage](bytearray(file.read_bytes()))
        file.write_bytes(data)
    generation = answer(engine, disk, prompt, mode)
    assert generation.token_ids == expected.token_ids
    assert generation.report.loaded_tokens == 0
    corrupt = {reason: n for reason, n in generation.report.miss_reasons().items() if reason.startswith("corrupt")}
    assert generation.report.recomputed_tokens == sum(corrupt.values())
    if mode == "load":
        assert generation.report.recomputed_tokens == 20 * CHUNK
        for file in sorted(disk.path.glob("chunks/*/*.chunk")):
            verify_chunk(memoryview(file.read_bytes()))


def test_a_chunk_copied_over_another_is_found(engine: TransformersEngine, prompt: list[int], disk: DiskStore) -> None:
    expected = answer(engine, None, prompt)
    files = sorted(disk.path.glob("chunks/*/*.chunk"))
    shutil.copy(files[3], files[4])
    generation = answer(engine, disk, prompt)
    assert generation.token_ids == expected.token_ids
    assert generation.report.miss_reasons()["corrupt: wrong key"] == CHUNK


class Meddling(Store):
    """Passes everything on, and calls `meddle(number)` before the n-th chunk is opened."""

    def __init__(self, inner: Store, meddle: Callable[[int], None]) -> None:
        self._inner = inner
        self._meddle = meddle
        self._opened = 0
        self._lock = threading.Lock()
        self.name = inner.name
        for method in ("lookup", "write", "delete", "stats", "remember_identity", "identities"):
            setattr(self, method, getattr(inner, method))

    def open(self, key: ChunkKey) -> ChunkReader:
        with self._lock:
            self._opened += 1
            number = self._opened
        self._meddle(number)
        return self._inner.open(key)

    def __iter__(self) -> Any:
        return iter(self._inner)

    lookup = write = delete = stats = remember_identity = identities = None  # type: ignore[assignment]


def test_a_store_deleted_in_mid_load(engine: TransformersEngine, prompt: list[int], disk: DiskStore) -> None:
    expected = answer(engine, None, prompt)
    meddling = Meddling(disk, lambda number: shutil.rmtree(disk.path) if number == 6 else None)
    with Cake(engine, store=meddling, chunk_tokens=CHUNK) as cake:
        generation = cake.generate(prompt, max_new_tokens=8, mode="load")
        saved = cake.wait_saved()
    assert generation.token_ids == expected.token_ids
    assert generation.report.recomputed_tokens > 0
    assert any("vanished" in reason for reason in generation.report.miss_reasons())
    assert (saved.failed_chunks, saved.error) == (0, None), "the folder is made anew by the first chunk that is saved"
    assert saved.saved_chunks == len(list(disk)) > 0


def test_a_store_that_fails_every_read(engine: TransformersEngine, prompt: list[int], disk: DiskStore) -> None:
    def fail(number: int) -> None:
        raise StoreError("the cable is out")

    expected = answer(engine, None, prompt)
    generation = answer(engine, Meddling(disk, fail), prompt)
    assert generation.token_ids == expected.token_ids
    assert generation.report.miss_reasons()["store failed: the cable is out"] == 20 * CHUNK


def test_a_store_that_cannot_be_asked(engine: TransformersEngine, prompt: list[int]) -> None:
    class Mute(MemoryStore):
        def lookup(self, keys: Any) -> Any:
            raise StoreError("no answer")

    expected = answer(engine, None, prompt)
    generation = answer(engine, Mute(), prompt, mode="auto")
    assert generation.token_ids == expected.token_ids
    assert any("no answer" in note for note in generation.report.notes)


def test_a_bug_in_a_tier_is_raised_not_hidden(engine: TransformersEngine, prompt: list[int], disk: DiskStore) -> None:
    def crash(number: int) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        answer(engine, Meddling(disk, crash), prompt)


def test_ctrl_c_in_mid_restore_leaves_the_store_whole(
    engine: TransformersEngine, prompt: list[int], disk: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(engine, None, prompt)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, disk, prompt, mode="both")
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before
    for file in disk.path.glob("chunks/*/*.chunk"):
        verify_chunk(memoryview(file.read_bytes()))
    assert answer(engine, disk, prompt).token_ids == expected.token_ids


def test_a_store_of_another_model_is_a_miss_that_says_why(
    engine: TransformersEngine, prompt: list[int], disk: DiskStore
) -> None:
    torch.manual_seed(8)
    other = TransformersEngine(LlamaForCausalLM(engine.model.config).float())
    expected = answer(other, None, prompt)
    with Cake(other, store=disk, chunk_tokens=CHUNK) as cake:
        generation = cake.generate(prompt, max_new_tokens=8, mode="load", save=False)
    assert generation.token_ids == expected.token_ids
    assert generation.report.loaded_tokens == 0
    assert any("differs in: weights" in note for note in generation.report.notes)


def test_a_store_of_another_dtype_is_a_miss_that_says_why(
    engine: TransformersEngine, prompt: list[int], disk: DiskStore
) -> None:
    half = LlamaForCausalLM(engine.model.config)
    half.load_state_dict(engine.model.state_dict())
    prefill = Cake(TransformersEngine(half.bfloat16()), store=disk, chunk_tokens=CHUNK).prefill(prompt, save=False)
    assert prefill.report.loaded_tokens == 0
    assert any("dtype" in note for note in prefill.report.notes)


def test_a_store_of_another_format_version_is_refused(engine: TransformersEngine, disk: DiskStore) -> None:
    marker = disk.path / "cakekv-store.json"
    marker.write_text(marker.read_text().replace("1", "99"))
    with pytest.raises(StoreError, match="another version"):
        Cake(engine, store=f"file://{disk.path}", chunk_tokens=CHUNK)


def test_a_store_that_is_full_declines_and_the_answer_comes_all_the_same(
    engine: TransformersEngine, prompt: list[int], tmp_path: Path
) -> None:
    expected = answer(engine, None, prompt)
    with DiskStore(tmp_path / "kv", capacity=10_000) as store, Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        generation = cake.generate(prompt, max_new_tokens=8)
        assert generation.token_ids == expected.token_ids
        assert cake.wait_saved().declined_chunks == 21


TWO_PROCESSES = """
import random, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.cake.conftest import CHUNK, engine, prompt
from cakekv.cake import Cake
model, tokens = engine.__wrapped__(), prompt.__wrapped__()
with Cake(model, store=f"file://{sys.argv[1]}", chunk_tokens=CHUNK) as cake:
    for turn in range(4):
        own = [int(sys.argv[2])] * CHUNK + tokens
        for ids in (tokens, own):
            print(cake.generate(ids, max_new_tokens=6).token_ids, cake.wait_saved().failed_chunks)
"""


def test_two_processes_on_one_store(engine: TransformersEngine, prompt: list[int], tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "kv"), str(number), str(root)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=6).token_ids
    for number, run in enumerate(runs, start=1):
        own = Cake(engine, chunk_tokens=CHUNK).generate([number] * CHUNK + prompt, max_new_tokens=6).token_ids
        lines = run.communicate(timeout=240)[0].splitlines()
        assert lines == [f"{expected} 0", f"{own} 0"] * 4
    store = DiskStore(tmp_path / "kv")
    assert store.stats().chunks == 20 + 2 * 21 + 3, "prompts, and tails"
    for file in store.path.glob("chunks/*/*.chunk"):
        verify_chunk(memoryview(file.read_bytes()))
