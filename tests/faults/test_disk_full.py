"""A disk that is really full: the kernel says so, and nothing half-visible is left."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.chunk import verify_chunk
from cakekv.errors import StoreFull
from cakekv.store.disk import DiskStore
from tests.faults.processes import printed, running
from tests.store.chunks import SIZE, chunk_of, key_of, read

CHUNK = 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_prompt_whose_chunks_do_not_fit(engine: Any, prompt: list[int], small_disk: Path) -> None:
    expected = Cake(engine, chunk_tokens=CHUNK).generate(prompt, max_new_tokens=8).token_ids
    store = DiskStore(small_disk / "kv")
    with Cake(engine, store=store, chunk_tokens=CHUNK) as cake:
        assert cake.generate(prompt, max_new_tokens=8).token_ids == expected
        saved = cake.wait_saved()
        assert saved.saved_chunks > 0
        assert saved.failed_chunks == 20 + 1 - saved.saved_chunks > 0, "with the answer's"
        assert saved.error is not None
        assert "No space left on device" in saved.error
        stored = list(store)
        assert len(stored) == saved.saved_chunks
        for chunk in stored:
            verify_chunk(memoryview(read(store, chunk.key)))
        assert not any((store.path / "incoming").iterdir())
        restored = cake.generate(prompt, max_new_tokens=8, mode="load", save=False)
        assert restored.token_ids == expected
        assert restored.report.loaded_tokens == len(stored) * CHUNK
        store.delete([chunk.key for chunk in stored[:3]])
        before = cake.wait_saved().saved_chunks
        assert cake.generate(prompt, max_new_tokens=8, mode="load").token_ids == expected
        assert cake.wait_saved().saved_chunks >= before + 3, "there is room again"


def write_with_a_limit(folder: str) -> None:
    """Run in a process of its own: files may not grow beyond half a chunk for a while."""
    import resource

    store = DiskStore(folder)
    assert store.write(key_of(0), chunk_of(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    with pytest.raises(StoreFull, match="File too large"):
        store.write(key_of(1), chunk_of(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [chunk.key for chunk in store] == [key_of(0)]
    assert not any(Path(folder, "incoming").iterdir())
    assert store.write(key_of(1), chunk_of(1))
    print("done")


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    with running(f"tests.faults.test_disk_full.write_with_a_limit({str(tmp_path / 'kv')!r})") as process:
        assert printed(process) == "done\n"
