"""The plug-in's options: defaults, what they take, and what a wrong one is told."""

import json
import traceback
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, BadOption
from cakekv.vllm.config import DEFAULT_STORE, VllmOptions


def options(**given: object) -> VllmOptions:
    return VllmOptions.from_extra_config(given)


def test_without_options_the_store_is_a_bounded_folder_of_the_user() -> None:
    assert options().store == (DEFAULT_STORE,)
    assert "capacity" in DEFAULT_STORE


def test_values_as_they_come_from_json() -> None:
    given = options(
        store=["/a?capacity=1GB", "/b"],
        chunk_tokens=512,
        codec="kivi:bits=4,window=256",
        shards=8,
        mode="both",
        load_deadline="500ms",
        save=False,
        save_queue="64MiB",
        tenant="blue",
    )
    assert given.store == ("/a?capacity=1GB", "/b")
    assert given.load_deadline == 0.5
    assert given.save_queue == 64 * 2**20
    assert options(store="/a").store == ("/a",)
    assert options(documents_separator=[5, 6]).documents_separator == (5, 6)
    assert options(documents_separator=" # # ").documents_separator == " # # "
    assert options(load_deadline=3).load_deadline == 3.0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("store", [], "URL"),
        ("store", "", "URL"),
        ("store", 5, "URL"),
        ("store", ["/a", "/a"], "twice"),
        ("store", "memory://", "/dev/shm"),
        ("store", "ftp://host", "file, gs, memory"),
        ("store", "/a?size=1GB", "capacity"),
        ("chunk_tokens", 0, "greater than or equal to 1"),
        ("chunk_tokens", "256", "valid integer"),
        ("chunk_tokens", True, "valid integer"),
        ("store", ["/a", "tiered:///b.toml"], "name it alone"),
        ("codec", "zip", "raw, fp8, int8"),
        ("codec", "kivi:bits=9", "2, 3 or 4"),
        ("documents_separator", 5, "a text, or a list of token ids"),
        ("documents_separator", [5, -6], "whole numbers"),
        ("link_tokens", -1, "greater than or equal to 0"),
        ("shards", -1, "greater than or equal to 0"),
        ("mode", "fast", "auto, compute, load, both"),
        ("mode", ["auto"], "auto, compute, load, both"),
        ("load_deadline", 0, "greater than 0"),
        ("load_deadline", float("inf"), "finite"),
        ("load_deadline", "soon", '"2ms"'),
        ("save", "yes", "valid boolean"),
        ("save_queue", "lots", '"10GB"'),
        ("layered_finish", 1, "valid boolean"),
        ("decode_slowdown", 0.5, "such as 1.5, or 0"),
        ("decode_slowdown", -1.0, "greater than or equal to 0"),
        ("load_threads", -1, "greater than or equal to 0"),
        ("tenant", None, "valid string"),
    ],
)
def test_a_wrong_value_is_refused_with_its_option_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(BadOption) as refused:
        options(**{name: value})
    assert f"option {name} is" in str(refused.value)
    assert repr(value) in str(refused.value)
    assert allowed in str(refused.value)


def test_an_unknown_option_is_refused_with_the_likely_one() -> None:
    with pytest.raises(BadOption, match=r"unknown option chunk_token .*did you mean chunk_tokens\?.* there are store,"):
        options(chunk_token=256)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(BadInput, match=r"option mode .*; option save "):
        options(mode="no", save=1)


@pytest.mark.parametrize(
    "store",
    [
        "redis://user:hunter2xyz@host?bogus=1",
        "redis://host?password=hunter2xyz",
        "/kv?capacity=hunter2xyz",
        ["/kv", "s3://bucket?hunter2xyz=1"],
        "memory://?encrypt=hunter2xyz",
    ],
)
def test_a_secret_in_a_store_is_not_shown(store: str) -> None:
    with pytest.raises(BadOption, match="option store is ") as refused:
        options(store=store)
    assert "hunter2xyz" not in "".join(traceback.format_exception(refused.value))


def test_options_are_shown_without_secrets() -> None:
    shown = repr(options(store=["/kv?encrypt=hunter2xyz", "redis://user:hunter2xyz@host"], tenant="hunter2xyz"))
    assert "hunter2xyz" not in shown
    assert "redis://…@host" in shown
    assert options(store="redis://user:hunter2xyz@host").store == ("redis://user:hunter2xyz@host",)


def test_chunks_are_whole_blocks() -> None:
    options(chunk_tokens=256).check_block_size(128)
    options(chunk_tokens=256).check_block_size(16)
    with pytest.raises(BadOption, match=r"chunk_tokens is 200.* block size of 128 tokens: write 128 or 256"):
        options(chunk_tokens=200).check_block_size(128)
    with pytest.raises(BadOption, match="write 128, or"):
        options(chunk_tokens=64).check_block_size(128)


@pytest.mark.parametrize(
    ("config", "matters"),
    [
        ({"rope_scaling": None}, False),
        ({"rope_parameters": {"rope_type": "longrope"}}, True),
        ({"text_config": {"attn_temperature_tuning": True}}, True),
    ],
)
def test_the_longest_prompt_names_chunks_where_keys_depend_on_it(
    config: dict[str, Any], matters: bool, tmp_path: Path
) -> None:
    from types import SimpleNamespace as Some

    from cakekv.vllm.scheduling.identity import architecture_of

    (tmp_path / "config.json").write_text(json.dumps(config))
    common: dict[str, Any] = {
        "model": str(tmp_path),
        "hf_config_path": None,
        "revision": None,
        "hf_overrides": {},
        "quantization": None,
    }
    models = [Some(max_model_len=length, **common) for length in (4096, 32768)]
    short, long = (architecture_of(model) for model in models)
    assert (short != long) == matters
