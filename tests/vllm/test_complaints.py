"""A store that fails fills no log: trouble is said once, and counted."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from tiny_engine import BLOCK, TinyEngine, closing, prompt, sampling, scripted

from cakekv.vllm import complaints
from cakekv.vllm.complaints import Complaints


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.cakekv")
    return caplog


def test_the_first_is_said_and_the_others_counted(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(complaints, "monotonic", lambda: now[0])
    trouble = Complaints("chunks are lost")
    for number in range(1000):
        trouble.say(f"chunk {number}")
    assert [record.getMessage() for record in log.records] == ["cakekv: chunks are lost: chunk 0"]
    now[0] = complaints.QUIET_S
    trouble.say("chunk 1000")
    assert log.records[-1].getMessage() == (
        "cakekv: chunks are lost: chunk 1000 (999 times more since this was last said)"
    )
    assert len(log.records) == 2


def test_a_store_that_full_is_one_line(model: Path, log: pytest.LogCaptureFixture) -> None:
    store = scripted("full")
    with closing(TinyEngine(model, {"store": "scripted://full"})) as engine:
        logging.getLogger("vllm").propagate = True  # engines set their log up
        store.broken = None
        for number in range(4):
            engine.run(prompt(1000, number))
        engine.settle()
        store.recover_now()
    lines = [record.getMessage() for record in log.records if "could not be saved" in record.getMessage()]
    assert len(lines) == 1


def test_a_folder_that_was_removed_is_saved_to_again(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    options = {"store": f"file://{folder}", "mode": "load"}
    with closing(TinyEngine(model, options)) as engine:
        engine.run(prompt(500))
        engine.settle()
        assert len(list(folder.glob("chunks/*/*"))) == 3
        shutil.rmtree(folder)
        outputs = engine.run(prompt(500, 1))
        engine.settle()
        assert len(list(folder.glob("chunks/*/*"))) == 3
    with closing(TinyEngine(model, options)) as engine:
        assert engine.run(prompt(500, 1)) == outputs
        assert engine.report().loaded_tokens == 3 * BLOCK


def test_a_huge_field_is_not_logged_whole(model: Path, log: pytest.LogCaptureFixture) -> None:
    with closing(TinyEngine(model, {"store": "scripted://huge"})) as engine:
        logging.getLogger("vllm").propagate = True
        for wrong in ({"mode": "x" * 2_000_000}, {"y" * 2_000_000: 1}, "z" * 2_000_000, [["deep"] * 1000] * 1000):
            params = sampling(extra_args={"kv_transfer_params": {"cakekv": wrong}})
            engine.run(prompt(200), params)
    lines = [record.getMessage() for record in log.records if "what it cannot have" in record.getMessage()]
    assert len(lines) == 4
    assert max(map(len, lines)) < 1000
