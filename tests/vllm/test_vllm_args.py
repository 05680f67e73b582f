"""`cakekv vllm-args`: what it prints is what vLLM parses; what is wrong is refused."""

from __future__ import annotations

import importlib
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.utils.import_utils import resolve_obj_by_qualname

from cakekv.cli.main import app
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.plugin import CONNECTOR, make_scheduler, register


def printed(*words: str) -> tuple[VllmOptions, KVTransferConfig, str]:
    """What the plug-in and vLLM make of the printed options, as a shell would pass them on."""
    result = CliRunner().invoke(app, ["vllm-args", *words])
    assert result.exit_code == 0, result.stderr
    option, transfer, scheduler_option, scheduler = shlex.split(result.stdout)
    assert (option, scheduler_option) == ("--kv-transfer-config", "--scheduler-cls")
    config = KVTransferConfig(**json.loads(transfer))
    return VllmOptions.from_extra_config(config.kv_connector_extra_config), config, scheduler


def test_the_defaults() -> None:
    options, config, scheduler = printed()
    assert options == VllmOptions()
    assert config.is_kv_consumer
    assert config.is_kv_producer
    assert config.kv_load_failure_policy == "recompute"
    assert resolve_obj_by_qualname(scheduler) is make_scheduler


def test_all_that_can_be_told() -> None:
    options, _, _ = printed(
        *("--store", "/a b?capacity=1GB", "--store", "~/it's", "--chunk-tokens", "512", "--mode", "both"),
        *("--load-deadline", "500ms", "--no-save", "--save-queue", "64MiB", "--load-threads", "3"),
        *("--tenant", 'a "quoted" $name', "--log-requests", "--layered-finish", "--block-size", "128"),
        *("--decode-slowdown", "1.5", "--documents-separator", "5, 6", "--link-tokens", "32"),
    )
    assert options == VllmOptions(
        store=("/a b?capacity=1GB", "~/it's"),
        chunk_tokens=512,
        mode="both",
        load_deadline=0.5,
        save=False,
        save_queue=64 * 2**20,
        load_threads=3,
        tenant='a "quoted" $name',
        log_requests=True,
        layered_finish=True,
        decode_slowdown=1.5,
        documents_separator=(5, 6),
        link_tokens=32,
    )


def test_every_option_of_the_plug_in_can_be_given() -> None:
    helped = CliRunner().invoke(app, ["vllm-args", "--help"], env={"COLUMNS": "200"}).stdout
    for name in set(VllmOptions.model_fields) - {"untested_vllm"}:  # an emergency exit, not to be found by chance
        assert f"--{name.replace('_', '-')}" in helped


def test_a_relative_folder_is_the_same_wherever_vllm_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options, _, _ = printed("--store", "kv?capacity=1GB")
    assert options.store == (f"{tmp_path}/kv?capacity=1GB",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "fast"], "option mode is 'fast'"),
        (["--store", "memory://"], "/dev/shm"),
        (["--chunk-tokens", "200", "--block-size", "128"], "write 128 or 256"),
        (["--chunk-tokens", "100"], "block size of 16 tokens: write 96 or 112, or change --block-size"),
        (["--chunk-tokens", "8"], "write 16, or change --block-size"),
    ],
)
def test_what_is_wrong_is_refused(words: Any, message: str) -> None:
    result = CliRunner().invoke(app, ["vllm-args", *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout


def test_as_json() -> None:
    words = json.loads(CliRunner().invoke(app, ["vllm-args", "--json"]).stdout)
    assert words[0] == "--kv-transfer-config"
    assert len(words) == 4


def test_vllm_finds_the_connector_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["cakekv"].partition(":")
    entry = getattr(importlib.import_module(module), name)
    assert entry is register
    entry()
    entry()  # vLLM may load plug-ins more than once
    config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both")
    assert KVConnectorFactory.get_connector_class(config).__name__ == CONNECTOR
