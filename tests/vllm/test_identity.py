"""An upgrade keeps the store: keys follow from what a model's files say, not from what libraries make of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import vllm
from tiny_engine import BLOCK, TinyEngine, closing, prompt, scripted

from cakekv.vllm.scheduling import identity
from cakekv.vllm.scheduling.identity import ChunkNames

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000.0,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A model's folder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def root(folder: Path, change: Any = None, **options: Any) -> str:
    """The identity that an engine's chunks have; `change` is done to its configuration first."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 2048}
    config = EngineArgs(model=str(folder), **(settings | options)).create_engine_config()
    config.cache_config.prefix_caching_hash_algo = identity.HASH
    if change is not None:
        change(config)
    return ChunkNames(config, 256, 128, "layout", "", "raw").identity.root.hex()


def test_the_same_model_has_the_same_key_under_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert root(write(tmp_path / "model", LLAMA)) == "c225142eada40b0b65bb62900c5a7d0edfd0c5f7944808ab0eaa42bb2407377f"


def test_wherever_it_lies_and_whatever_wrote_it(tmp_path: Path) -> None:
    first = root(write(tmp_path / "model", LLAMA))
    said = LLAMA | {"_name_or_path": "/somewhere/else", "transformers_version": "5.99.0"}
    assert root(write(tmp_path / "elsewhere" / "renamed", dict(reversed(said.items())))) == first


def test_fields_that_a_library_adds_removes_or_moves_do_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", LLAMA)

    def upgrade(config: Any) -> None:
        config.model_config.hf_config.brand_new_default = 1.0
        config.model_config.hf_config.rope_parameters["brand_new_default"] = 1.0
        del config.model_config.hf_config.mlp_bias
        assert "brand_new_default" in config.model_config.hf_config.to_dict()

    assert root(folder, upgrade) == root(folder)


def test_fields_that_a_library_adds_to_a_part_do_not_count(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    model = SimpleNamespace(
        model=str(tmp_path), hf_config_path=None, revision=None, hf_overrides={}, quantization=None, max_model_len=2048
    )
    texts = []
    for path in ("/here", "/there"):
        config = LlavaConfig(text_config=LlamaConfig(_name_or_path=path), vision_config=CLIPVisionConfig())
        said = config.to_dict()
        said["text_config"]["_name_or_path"] = path
        write(tmp_path, said)
        config.text_config.brand_new_default = path
        texts.append(identity.architecture_of(SimpleNamespace(**vars(model), hf_config=config)))
    assert texts[0] == texts[1]
    assert "brand_new_default" not in texts[0]


@pytest.mark.parametrize(
    "options",
    [
        {"hf_overrides": {"rms_norm_eps": 1e-5}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}},
        {"hf_overrides": lambda config: config.update({"rms_norm_eps": 1e-5}) or config},
        {"quantization": "fp8"},
        {"dtype": "float32"},
        {"kv_cache_dtype": "fp8"},
    ],
    ids=["override", "override of a part", "override by a function", "quantization", "dtype", "cache"],
)
def test_what_changes_keys_and_values_counts(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write(tmp_path, LLAMA)
    assert root(folder, **options) != root(folder)


def test_what_the_files_say_counts(tmp_path: Path) -> None:
    roots = {root(write(tmp_path, LLAMA | change)) for change in ({}, {"rope_theta": 1e4}, {"attention_bias": True})}
    assert len(roots) == 3


def test_hashes_that_look_ahead_are_others(tmp_path: Path) -> None:
    """As vLLM 0.33 has them for some draft models, though not beside a KV connector."""
    folder = write(tmp_path, LLAMA)
    plain, ahead = (
        SimpleNamespace(**(vars(config_of(folder)) | {"num_hash_lookahead_tokens": tokens})) for tokens in (0, 1)
    )
    first, second = (ChunkNames(each, 256, 128, "layout", "", "raw").identity for each in (plain, ahead))
    assert first.root.hex() == root(folder)
    assert first.root != second.root


def config_of(folder: Path) -> Any:
    """What `root` looks at."""
    kept: list[Any] = []
    root(folder, kept.append)
    return kept[0]


def test_a_configuration_in_no_file_is_taken_from_the_library(tmp_path: Path) -> None:
    """As that of a GGUF file."""
    folder = write(tmp_path, LLAMA)
    config = config_of(folder)
    expected = identity.architecture_by_library(config.model_config)
    (folder / "config.json").unlink()
    assert identity.architecture_of(config.model_config) == expected


def test_what_an_earlier_cakekv_stored_is_found(
    model: Path, plain: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = scripted("earlier")
    options = {"store": "scripted://earlier", "mode": "load"}
    with monkeypatch.context() as patch:
        patch.setattr(identity, "architecture_of", identity.architecture_by_library)
        with closing(TinyEngine(model, options)) as engine:
            assert engine.run(prompt(1000)) == plain[1000]
            engine.settle()
    assert len(list(store)) == 7
    for _ in range(2):
        with closing(TinyEngine(model, options)) as engine:
            assert engine.run(prompt(1000)) == plain[1000]
            engine.settle()
            assert engine.report().loaded_tokens == 7 * BLOCK
    assert len(list(store)) == 7


def test_a_model_that_was_moved_finds_its_chunks(model: Path, plain: dict[int, list[int]], tmp_path: Path) -> None:
    store = scripted("moved")
    options = {"store": "scripted://moved", "mode": "load"}
    for folder in (model, Path(shutil.copytree(model, tmp_path / "another name"))):
        with closing(TinyEngine(folder, options)) as engine:
            assert engine.run(prompt(1000)) == plain[1000]
            engine.settle()
            loaded = engine.half.outcomes.latest[-1][1].loaded_tokens if engine.half.outcomes.latest else 0
            assert loaded == (0 if folder == model else 7 * BLOCK)
    assert len(list(store)) == 7


OVERLAY = Path(str(vllm.__file__)).parents[1]


@pytest.mark.skipif(not list(OVERLAY.glob("vllm-*+cpu.dist-info")), reason="vLLM is not laid over another: VLLM=0.33")
def test_what_the_vllm_below_stored_is_found(model: Path, plain: dict[int, list[int]], tmp_path: Path) -> None:
    """An upgrade of vLLM, with a store on disk."""
    options = {"store": str(tmp_path), "mode": "load"}
    code = f"""
from tiny_engine import TinyEngine, prompt
import vllm
assert vllm.__version__ != {vllm.__version__!r}
engine = TinyEngine({str(model)!r}, {options!r})
engine.run(prompt(1000))
engine.settle()
engine.close()
"""
    paths = [str(Path(__file__).parent), *(path for path in sys.path if Path(path) != OVERLAY)]
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    with closing(TinyEngine(model, options)) as engine:
        assert engine.run(prompt(1000)) == plain[1000]
        engine.settle()
        assert engine.report().loaded_tokens == 7 * BLOCK


def test_every_field_of_the_configuration_was_thought_about() -> None:
    """Of the vLLM that is installed: a new field may change keys and values, and only somebody who looks can tell."""
    from vllm.config import VllmConfig

    from cakekv.vllm.engine_fields import FIELDS

    found: dict[str, set[str]] = {}

    def look(owner: type) -> None:
        if owner.__name__ in found:
            return
        found[owner.__name__] = {field.name for field in fields(owner)}
        hints = get_type_hints(owner)
        for field in fields(owner):
            for part in (hints[field.name], *get_args(hints[field.name])):
                if isinstance(part, type) and is_dataclass(part):
                    look(part)

    look(VllmConfig)
    assert len(found) > 30
    known = {name: [field for of in reasons.values() for field in of.split()] for name, reasons in FIELDS.items()}
    assert all(len(names) == len(set(names)) for names in known.values())
    assert {name: new for name, names in found.items() if (new := names - set(known.get(name, ())))} == {}


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": {"linear": "fp8_per_tensor"}},
        {"quantization_config": {"linear": "fp8_per_tensor", "ignore": ["*qkv*"]}},
        {"quantization": "fp8_per_tensor", "quantization_config": {"ignore": ["*qkv*"]}},
        {"kv_cache_dtype_skip_layers": ["0"]},
        {"code_revision": "v2"},
        {"additional_config": {"anything": 1}},
        {"model_loader_extra_config": {"tensorizer_uri": "elsewhere"}},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_settings_that_change_what_is_computed_count(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write(tmp_path, LLAMA)
    other = {"quantization": "online"} if "quantization_config" in options else {}
    assert root(folder, **(other | options)) not in (root(folder), root(folder, **other) if not other else "")


def test_every_quantization_config_is_another(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA)
    given: list[dict[str, Any]] = [
        {"linear": "fp8_per_tensor"},
        {"linear": "fp8_per_block"},
        {"linear": "fp8_per_tensor", "ignore": ["*k_proj*"]},
    ]
    assert len({root(folder, quantization="online", quantization_config=each) for each in given}) == len(given)


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True}, {"seed": 7}, {"max_num_seqs": 3}, {"served_model_name": "other"}, {"max_logprobs": 5}],
    ids=str,
)
def test_settings_that_change_nothing_do_not_count(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write(tmp_path, LLAMA)
    assert root(folder, **options) == root(folder)
