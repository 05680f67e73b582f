"""The same model folder has the same keys in every release of transformers that is supported, and wherever it lies."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blake3 import blake3
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig

from cakekv.engine.identify import architecture
from cakekv.engine.transformers import TransformersEngine
from tests.matrix.models import CONFIGS, build

ROOTS: dict[str, str] = json.loads(Path(__file__).with_name("roots.json").read_text())
"""By family, the digest that its first chunk's key follows; by configuration class, that of its `architecture`.

Those of the families are what cakekv 0.1 made with transformers 5.23. A line that changes is a store that is lost."""


def named_weights(name: str) -> Any:
    """A model whose tensors follow from their names: in whichever order a release makes them."""
    model = build(name)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.fill_(int.from_bytes(blake3(key.encode()).digest(2), "little") / 65536)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_the_keys_it_always_had(name: str) -> None:
    assert TransformersEngine(named_weights(name)).identity(8).root.hex() == ROOTS[name]


@pytest.mark.parametrize("name", [name for name in ROOTS if name.endswith("Config")])
def test_so_have_configurations_made_of_several(name: str) -> None:
    assert blake3(architecture(getattr(transformers, name)()).encode()).hexdigest() == ROOTS[name]


@dataclass
class NewerLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """What a release might make of `LlamaConfig`."""

    new_switch: bool = False
    new_width: int | None = None

    def __post_init__(self, **arguments: Any) -> None:
        super().__post_init__(**arguments)
        if self.new_width is None:
            self.new_width = 2 * self.hidden_size


def test_a_setting_that_a_release_adds_changes_no_key() -> None:
    assert json.loads(NewerLlamaConfig().to_json_string(use_diff=False))["new_width"] == 8192
    assert architecture(NewerLlamaConfig()) == architecture(LlamaConfig())
    assert architecture(NewerLlamaConfig(hidden_size=64)) == architecture(LlamaConfig(hidden_size=64))


@pytest.mark.parametrize("settings", [{"new_switch": True}, {"new_width": 5}])
def test_unless_the_model_sets_it(settings: dict[str, Any]) -> None:
    assert architecture(NewerLlamaConfig(**settings)) != architecture(LlamaConfig())


@dataclass
class NewerTextConfig(Gemma3TextConfig):  # type: ignore[misc]
    new_scale: float = 0.5


def test_so_in_a_part_of_a_configuration() -> None:
    before = architecture(Gemma3Config(text_config=Gemma3TextConfig()))
    assert "new_scale" in Gemma3Config(text_config=NewerTextConfig()).to_json_string(use_diff=False)
    assert architecture(Gemma3Config(text_config=NewerTextConfig())) == before
    assert architecture(Gemma3Config(text_config=NewerTextConfig(new_scale=0.25))) != before


def test_a_folder_may_be_renamed_and_moved(tmp_path: Path) -> None:
    first, second = tmp_path / "llama", tmp_path / "elsewhere" / "a copy, 2"
    build("llama").save_pretrained(first)
    shutil.copytree(first, second)
    before, after = (TransformersEngine.from_pretrained(folder, device="cpu") for folder in (first, second))
    assert before.model.config._name_or_path != after.model.config._name_or_path
    assert before.identity(8) == after.identity(8)
