"""Recalls from real servers, and from a folder that two processes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv import Cake
from cakekv.chunk import read_header
from cakekv.engine.transformers import TransformersEngine
from cakekv.store.opening import open_store
from tests.decode.test_recall import CHUNK, LAZY, PROMPT, SPANS, STEPS
from tests.faults.processes import printed, running
from tests.matrix.models import build


def model() -> TransformersEngine:
    engine = TransformersEngine(build("qwen2", torch.float32))
    engine._stop_tokens = frozenset()
    return engine


def save(url: str) -> None:
    """Store a prompt, and print how many chunks that were."""
    with Cake(model(), store=url, chunk_tokens=CHUNK, decode=LAZY) as cake:
        cake.prefill(PROMPT)
        print(cake.wait_saved().saved_chunks)


def check(url: str) -> None:
    """Recall it to the end; damage a row; recall and answer again, and see it mended."""
    engine = model()
    computed = Cake(engine, chunk_tokens=CHUNK).prefill(PROMPT).cache
    with Cake(engine, store=url, chunk_tokens=CHUNK, decode=LAZY) as cake, open_store(url) as store:
        for _ in range(2):
            prefill = cake.prefill(PROMPT, mode="load")
            assert prefill.report.recalled_tokens == SPANS, prefill.report.notes
            assert prefill.recall is not None
            prefill.recall.settle()
            for recalled, own in zip(prefill.cache.stored, computed.stored, strict=True):
                for number, plane in enumerate(recalled.planes):
                    assert torch.equal(plane[:, :SPANS], own.plane(number)[0, :, :SPANS])
            answer = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load").token_ids
            for chunk in list(store):
                with store.open(chunk.key) as reader:
                    data = memoryview(bytearray(reader.size))
                    done = 0
                    while done < reader.size:
                        done += reader.read_into(data[done : done + reader.slice_bytes], done)
                header = read_header(data, len(data)) if len(data) % 4096 == 0 else None
                if header is not None and header.tokens == 32 and header.position == 64:
                    data[header.offsets[len(engine.layout.layers)] + 3] ^= 8
                    store.write(chunk.key, data)
                    break
            else:
                raise AssertionError("there is no such sidecar")
            damaged = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
            assert len(damaged.token_ids) == STEPS
            assert damaged.report.notes
            cake.wait_saved()
            assert cake.generate(PROMPT, max_new_tokens=STEPS, mode="load").token_ids == answer


URLS: dict[str, Callable[[Any, Path], str]] = {
    "valkey": lambda shared, folder: f"redis://127.0.0.1:{shared.valkey}/0?prefix=recalls:",
    "s3": lambda shared, folder: f"s3://bucket/recalls?endpoint={shared.s3}&http=true",
    "disk": lambda shared, folder: str(folder),
}


@pytest.mark.parametrize("kind", URLS)
def test_a_prompt_is_recalled_to_the_bit(kind: str, shared: Any, tmp_path: Path) -> None:
    url = URLS[kind](shared, tmp_path / "kv")
    save(url)
    check(url)


def test_two_processes_recall_from_one_folder(tmp_path: Path) -> None:
    """What one has stored, two others recall at the same time."""
    url = str(tmp_path / "kv")
    save(url)
    with (
        running(f"tests.store.test_recalls.recall({url!r})") as one,
        running(f"tests.store.test_recalls.recall({url!r})") as other,
    ):
        assert printed(one) == printed(other) != ""


def recall(url: str) -> None:
    """Recall it a few times, each answer from the start; print the tokens."""
    with Cake(model(), store=url, chunk_tokens=CHUNK, decode=LAZY) as cake:
        found = set()
        for _ in range(6):
            answer = cake.generate(PROMPT, max_new_tokens=STEPS, mode="load")
            assert answer.report.recalled_tokens == SPANS
            found.add(tuple(answer.token_ids))
        print(*found)
