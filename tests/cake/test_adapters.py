"""PEFT's adapters, switched between and within requests: each has its own chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import UnsupportedModel
from tests.cake.test_changing_model import PROMPT, cake_of, check_exact
from tests.matrix.models import build

peft = pytest.importorskip("peft")


def fill(model: Any, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path and "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def with_adapters(*names: str, **settings: Any) -> Any:
    config = {"r": 4, "init_lora_weights": False, "target_modules": ["k_proj", "v_proj"], **settings}
    first, *others = names
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**config), adapter_name=first)
    for name in others:
        model.add_adapter(name, peft.LoraConfig(**config))
    for seed, name in enumerate(names):
        fill(model, name, seed)
    model.set_adapter(first)
    return model.eval()


@pytest.fixture
def model() -> Iterator[Any]:
    return with_adapters("red", "blue")


def test_each_adapter_loads_and_saves_its_own(model: Any) -> None:
    cake = cake_of(model)
    names = set()
    for loaded in (0, 96):
        for choose in (
            lambda: model.set_adapter("red"),
            lambda: model.set_adapter("blue"),
            lambda: model.base_model.set_adapter(["red", "blue"]),
            lambda: model.base_model.disable_adapter_layers(),
        ):
            model.base_model.enable_adapter_layers()
            choose()
            check_exact(cake, model, loaded)
            cake.wait_saved()
            names.add(cake.identity.root)
    assert len(names) == 4


def test_nothing_of_another_adapter_is_left_in_a_store(model: Any, tmp_path: Path) -> None:
    with cake_of(model, str(tmp_path)) as cake:
        model.set_adapter("blue")
        cake.prefill(PROMPT)
    model.set_adapter("red")
    with cake_of(model, str(tmp_path)) as cake:
        check_exact(cake, model, loaded=0)


def test_an_adapter_switched_within_a_request_ends_saving(model: Any) -> None:
    cake = cake_of(model)
    report = cake.prefill(
        PROMPT, on_progress=lambda progress: model.set_adapter("blue") if progress.front >= 32 else None
    ).report
    assert "The model changed" in report.notes[-1]
    assert cake.wait_saved().saved_chunks <= 4
    for name in ("red", "blue"):
        model.set_adapter(name)
        check_exact(cake, model, cake.wait_saved().saved_chunks * 8 if name == "red" else 0)


def test_merging_and_scaling_have_other_names(model: Any) -> None:
    engine = TransformersEngine(model)
    roots = [engine.identity(8).root]
    model.merge_adapter()
    roots.append(engine.identity(8).root)
    model.unmerge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    layer.scaling["red"] *= 2
    roots.append(engine.identity(8).root)
    layer.scaling["red"] /= 2
    with torch.no_grad():
        layer.lora_A["red"].weight += 1
    roots.append(engine.identity(8).root)
    assert len(set(roots)) == 4


def test_merged_for_good_it_is_the_model_that_it_became(model: Any) -> None:
    engine = TransformersEngine(model)
    before = engine.identity(8)
    merged = model.merge_and_unload()
    after = engine.identity(8)
    assert after.weights != before.weights, "PEFT writes through .data"
    assert after.adapter == ""
    assert after == TransformersEngine(merged).identity(8)


def test_taken_out_it_leaves_the_bare_model(model: Any) -> None:
    engine = TransformersEngine(model)
    assert engine.identity(8).adapter
    model.unload()
    assert engine.identity(8) == TransformersEngine(build("llama")).identity(8)


@pytest.mark.parametrize("name", ["0", "model", "layers", "k_proj", "mlp", "weight", "self_attn", "lora_A"])
def test_an_adapter_named_like_a_part_of_the_model_hides_nothing_of_it(name: str) -> None:
    roots = []
    for scale in (1.0, 1.5):
        model = build("llama")
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if name in path.split(".") or name == "lora_A":
                    parameter.mul_(scale)
        bare = TransformersEngine(model).identity(8).root
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
        adapted = peft.get_peft_model(model, config, adapter_name=name)
        fill(adapted, name, 0)
        engine = TransformersEngine(adapted)
        roots.append(engine.identity(8).root)
        adapted.base_model.disable_adapter_layers()
        assert engine.identity(8).root == bare
        roots.append(bare)
    assert len(set(roots)) == 4


def test_modules_saved_whole_belong_to_their_adapter() -> None:
    model = with_adapters("red", modules_to_save=["lm_head"])
    engine = TransformersEngine(model)
    before = engine.identity(8)
    bare = TransformersEngine(build("llama")).identity(8)
    assert before.weights == bare.weights
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["red"].weight.mul_(2)
    assert engine.identity(8).adapter != before.adapter
    assert engine.identity(8).weights == before.weights
    model.base_model.disable_adapter_layers()
    assert engine.identity(8) == bare


def test_an_activated_lora_is_refused_while_it_is_in_use() -> None:
    model = with_adapters("plain")
    activated = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], alora_invocation_tokens=[11, 12])
    model.add_adapter("activated", activated)
    engine = TransformersEngine(model)
    cake = cake_of(model)
    check_exact(cake, model, loaded=0)
    model.set_adapter("activated")
    for call in (cake.prefill, cake.generate):
        with pytest.raises(UnsupportedModel, match="aLoRA"):
            call(PROMPT)
    with pytest.raises(UnsupportedModel, match="aLoRA"):
        engine.state()
    model.set_adapter("plain")
    cake.wait_saved()
    check_exact(cake, model, loaded=96)


def test_dropout_of_an_adapter_in_training_has_no_name() -> None:
    model = with_adapters("red", lora_dropout=0.5)
    engine = TransformersEngine(model)
    assert engine.state().unnamed == ""
    model.base_model.model.model.layers[0].self_attn.k_proj.lora_dropout.train()
    model.base_model.model.model.layers[0].self_attn.k_proj.lora_dropout["red"].train()
    assert "training" in engine.state().unnamed
