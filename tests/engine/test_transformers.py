from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, UnsupportedModel
from tests.matrix.models import CONTEXT, VOCABULARY, build
from tests.matrix.restoring import CHUNK, gather, prefill, prompt


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama").to("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "the prompt is empty"),
        ([3, VOCABULARY], f"token id {VOCABULARY} at position 1 is out of range.* 0 to {VOCABULARY - 1}"),
        ([3, 4, -1], "token id -1 at position 2"),
        ([1.5], "integers"),
        ([[1, 2]], "flat"),
        ([3] * (CONTEXT + 1), f"{CONTEXT + 1} tokens, but the model's context is {CONTEXT}"),
    ],
)
def test_prompts_that_cannot_be(engine: TransformersEngine, tokens: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        engine.check_prompt(tokens)


def test_prompts_that_can_be(engine: TransformersEngine) -> None:
    engine.check_prompt([3])
    engine.check_prompt(np.full(CONTEXT, VOCABULARY - 1))  # type: ignore[arg-type]  # as arrays are prompts, too


def test_spans_and_chunks_must_fit(engine: TransformersEngine) -> None:
    cache = engine.new_cache(16)
    for tokens, start in (([], 0), ([3], -1), ([3], 16), ([3] * 9, 8)):
        with pytest.raises(BadInput, match="does not fit a cache of 16 tokens"):
            engine.compute(cache, tokens, start)
    segments = [engine.staging(size) for size in engine.layout.segment_bytes(CHUNK)]
    with pytest.raises(BadInput, match="does not fit a cache of 16 tokens"):
        engine.place(cache, 12, CHUNK, segments)
    with pytest.raises(BadInput, match="2 segments for 3 layers"):
        engine.place(cache, 0, CHUNK, segments[:2])
    with pytest.raises(BadInput, match=r"a layer's segment has \d+ bytes instead of"):
        engine.place(cache, 0, CHUNK, [*segments[:2], segments[2][:-1]])
    for capacity in (0, CONTEXT + 1):
        with pytest.raises(BadInput, match=f"1 to {CONTEXT} tokens"):
            engine.new_cache(capacity)


def test_place_and_gather_are_each_others_reverse(engine: TransformersEngine) -> None:
    full, _ = prefill(engine, prompt(), [0])
    segments = gather(engine, full, 16)
    other = engine.new_cache(64)
    assert engine.place(other, 40, CHUNK, segments) == sum(segment.nbytes for segment in segments)
    assert gather(engine, other, 40) == segments
    for ours, source in zip(other.stored, full.stored, strict=True):
        for region, original in zip(ours.regions, source.regions, strict=True):
            assert torch.equal(region[:, 40:48], original[:, 16:24])


def test_staging_is_aligned_and_of_the_asked_size(engine: TransformersEngine) -> None:
    for size in (1, 4096, 10_000):
        buffer = engine.staging(size)
        assert (buffer.nbytes, buffer.format, buffer.readonly) == (size, "B", False)
        assert np.frombuffer(buffer, np.uint8).ctypes.data % 4096 == 0


def test_dropout_is_off() -> None:
    model = build("gpt2").train()
    engine = TransformersEngine(model)
    first, second = (engine.compute(engine.new_cache(8), [5, 6, 7], 0) for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama", torch.bfloat16).save_pretrained(folder)
    return folder


def test_loads_a_folder(saved: Path) -> None:
    engine = TransformersEngine.from_pretrained(str(saved), device="cpu")
    assert engine.model.dtype == torch.bfloat16
    assert TransformersEngine.from_pretrained(saved, dtype="float32", device="cpu").model.dtype == torch.float32
    expected = TransformersEngine(build("llama", torch.bfloat16))
    logits = [each.compute(each.new_cache(8), [5, 6, 7], 0) for each in (engine, expected)]
    assert torch.equal(*logits)


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="there is no model folder"):
        TransformersEngine.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"no config\.json"):
        TransformersEngine.from_pretrained(tmp_path)
    for name in ("no-such-organisation/no-such-model", "no such model!", "a/b/c"):
        with pytest.raises(BadInput, match="cannot load the model"):
            TransformersEngine.from_pretrained(name)


def test_damaged_folders(saved: Path, tmp_path: Path) -> None:
    weights = "model.safetensors"
    truncated = shutil.copytree(saved, tmp_path / "truncated")
    os.truncate(truncated / weights, (saved / weights).stat().st_size // 2)
    without = shutil.copytree(saved, tmp_path / "without")
    (without / weights).unlink()
    garbled = shutil.copytree(saved, tmp_path / "garbled")
    (garbled / "config.json").write_text("{")
    other_shape = shutil.copytree(saved, tmp_path / "other-shape")
    config = (saved / "config.json").read_text()
    (other_shape / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    for folder in (truncated, without, garbled, other_shape):
        with pytest.raises(BadInput, match="cannot load the model"):
            TransformersEngine.from_pretrained(folder)


def test_incomplete_weights(tmp_path: Path) -> None:
    model = build("llama")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(BadInput, match=r"lacks 3 tensors, such as model\.layers\.1\.mlp"):
        TransformersEngine.from_pretrained(tmp_path)


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}')
    with pytest.raises(UnsupportedModel, match="running state"):
        TransformersEngine.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama-q4.gguf", "folder", "someone/Llama-GGUF", "./no-such.GGUF"])
def test_gguf_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-q4.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    Path("folder").mkdir()
    Path("folder/llama-q4.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BadInput, match=r"llama\.cpp's format, which is not read here. Give the folder"):
        TransformersEngine.from_pretrained(name)


def test_a_file_of_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"is a file \(give a folder with config.json"):
        TransformersEngine.from_pretrained(tmp_path / "model.safetensors")
