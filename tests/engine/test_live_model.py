"""The identity is of what computes now: whatever changes a model's forward changes it, or is said to have no name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import UnsupportedModel
from tests.matrix.models import CONFIGS, build, tiny

TOKENS = list(range(3, 43))


def root(engine: TransformersEngine) -> bytes:
    return engine.identity(8).root


def compute(engine: TransformersEngine) -> torch.Tensor:
    cache = engine.new_cache(len(TOKENS))
    engine.compute(cache, TOKENS[:20], 0)
    return engine.compute(cache, TOKENS[20:], 20)


def norm(model: Any) -> Any:
    return model.model.layers[1].input_layernorm


class OtherNorm(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * self.weight


def write_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5


def write_weights_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def write_through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.01)


def write_through_numpy(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight.detach().numpy()[:] *= 1.5


def load_other_weights(model: Any) -> None:
    other = CONFIGS["llama"]()
    torch.manual_seed(5)
    model.load_state_dict(AutoModelForCausalLM.from_config(other).state_dict())


def point_to_other_data(model: Any) -> None:
    weight = model.lm_head.weight
    weight.data = weight.data + 1


def replace_parameter(model: Any) -> None:
    norm(model).weight = torch.nn.Parameter(norm(model).weight.detach() * 2)


def train_a_step(model: Any) -> None:
    model(input_ids=torch.tensor([TOKENS]), labels=torch.tensor([TOKENS])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def scale_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.25


def replace_frequencies(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq * 0.5, persistent=False)


def change(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


NAMED: dict[str, Callable[[Any], Any]] = {
    "one weight written": write_weights,
    "written in inference mode": write_weights_in_inference_mode,
    "written through .data": write_through_data,
    "written through numpy": write_through_numpy,
    "load_state_dict": load_other_weights,
    ".data pointed elsewhere": point_to_other_data,
    "parameter replaced": replace_parameter,
    "training step": train_a_step,
    "RoPE scaled in place": scale_frequencies,
    "RoPE replaced": replace_frequencies,
    "attention scaling of RoPE": change("model.rotary_emb", "attention_scaling", 1.5),
    "epsilon of a norm": change("model.layers.1.input_layernorm", "variance_epsilon", 1.0),
    "scaling of attention": change("model.layers.0.self_attn", "scaling", 0.1),
    "layers dropped": lambda model: setattr(model.model, "layers", model.model.layers[:2]),
    "layers exchanged": lambda model: setattr(model.model, "layers", model.model.layers[::-1]),
    "activation replaced": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU().eval()),
    "configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "inside the configuration": lambda model: model.config.rope_parameters.update(rope_theta=5.0),
}


@pytest.mark.parametrize("how", NAMED)
def test_another_model_has_another_name(how: str) -> None:
    model = build("llama")
    engine = TransformersEngine(model)
    before, state = root(engine), engine.state()
    NAMED[how](model)
    if how != "layers dropped":  # which no cache of this engine fits
        assert engine.state() != state
        assert engine.state().unnamed == ""
        assert root(engine) != before
    again = build("llama")
    NAMED[how](again)
    try:
        fresh = TransformersEngine(again)
    except UnsupportedModel:
        return
    assert root(fresh) != before, "changed before the engine was made"
    if how != "layers dropped":
        assert root(fresh) == root(engine), "what is the same has the same name"


def hook(*_: Any) -> None:
    """Do nothing."""


def add_hook(model: Any) -> None:
    norm(model).register_forward_hook(hook)


def add_pre_hook(model: Any) -> None:
    model.model.layers[0].register_forward_pre_hook(hook)


def patch_forward(model: Any) -> None:
    forward = norm(model).forward
    norm(model).forward = lambda states: forward(states) * 2


def patch_with_wraps(model: Any) -> None:
    forward = norm(model).forward
    norm(model).forward = functools.wraps(forward)(lambda states: forward(states) * 2)


def replace_module(model: Any) -> None:
    model.model.layers[1].input_layernorm = OtherNorm(norm(model)).eval()


def own_attention(model: Any) -> None:
    AttentionInterface.register("own", lambda *arguments, **more: sdpa_attention_forward(*arguments, **more))
    model.set_attn_implementation("own")


UNNAMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "train": (lambda model: model.train(), "training"),
    "a part in training": (lambda model: model.model.layers[1].train(), "training"),
    "hook": (add_hook, "hook"),
    "pre-hook": (add_pre_hook, "hook"),
    "forward patched": (patch_forward, "forward"),
    "forward patched with wraps": (patch_with_wraps, "forward"),
    "module replaced": (replace_module, "OtherNorm"),
    "own attention": (own_attention, "attention implementation own"),
}


@pytest.mark.parametrize("how", UNNAMED)
def test_what_cannot_be_named_is_said(how: str) -> None:
    change_it, word = UNNAMED[how]
    model = build("llama")
    engine = TransformersEngine(model)
    state = engine.state()
    assert state.unnamed == ""
    change_it(model)
    assert word in engine.state().unnamed


@pytest.mark.parametrize("how", ["train", "hook", "forward patched"])
def test_undone_it_has_its_name_again_but_not_the_same_state(how: str) -> None:
    model = build("llama")
    engine = TransformersEngine(model)
    before, state = root(engine), engine.state()
    kept = dict(vars(norm(model)))
    UNNAMED[how][0](model)
    assert engine.state().unnamed
    model.eval()
    norm(model)._forward_hooks.clear()
    if "forward" not in kept:
        vars(norm(model)).pop("forward", None)
    assert engine.state().unnamed == ""
    assert root(engine) == before
    assert engine.state() != state


def test_a_class_or_a_function_replaced_for_all_models_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(build("llama"))
    assert engine.state().unnamed == ""
    original = modeling_llama.LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", functools.wraps(original)(lambda self, x: 2 * x))
        assert "LlamaMLP.forward" in engine.state().unnamed
    assert engine.state().unnamed == ""
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
        assert "apply_rotary_pos_emb" in TransformersEngine(build("llama")).state().unnamed
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", hook)
        assert "scaled_dot_product_attention" in engine.state().unnamed
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    assert "hook" in engine.state().unnamed
    handle.remove()
    assert engine.state().unnamed == ""


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextmanager
def device_context() -> Iterator[None]:
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize(
    ("surroundings", "word"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast"),
        (Watching, "mode"),
        (device_context, ""),
        (torch.no_grad, ""),
        (torch.inference_mode, ""),
    ],
)
def test_what_is_around_the_call_counts(surroundings: Callable[[], Any], word: str) -> None:
    engine = TransformersEngine(build("llama"))
    with surroundings():
        assert word in engine.state().unnamed
        assert bool(engine.state().unnamed) == bool(word)
    assert engine.state().unnamed == ""


def test_an_engine_made_under_autocast_is_the_same() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = TransformersEngine(build("llama"))
    assert root(engine) == root(TransformersEngine(build("llama")))


def test_less_precise_products_have_another_name() -> None:
    engine = TransformersEngine(build("llama"))
    before = root(engine)
    torch.set_float32_matmul_precision("medium")
    try:
        assert root(engine) != before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert root(engine) == before


def test_attention_implementations_of_falcon_with_alibi_differ() -> None:
    roots = {root(TransformersEngine(build("falcon-alibi", attention=one))) for one in ("sdpa", "eager")}
    assert len(roots) == 2
    model = build("falcon-alibi", attention="sdpa")
    engine = TransformersEngine(model)
    before = root(engine)
    model.config._attn_implementation = "eager"
    assert root(engine) != before
    assert root(engine) in roots


@pytest.mark.parametrize("family", CONFIGS)
def test_computing_and_collecting_outputs_change_nothing(family: str) -> None:
    model = build(family)
    engine = TransformersEngine(model)
    before, state = root(engine), engine.state()
    assert " but [" not in engine.identity(8).architecture
    compute(engine)
    with torch.inference_mode():
        model(input_ids=torch.tensor([TOKENS]), output_hidden_states=True)
    model.requires_grad_(False)
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert engine.state() == state
    assert root(engine) == before
    assert root(TransformersEngine(model)) == before
    assert torch.rand(1) == drawn


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256},
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_follow_from_the_configuration(rope: dict[str, Any]) -> None:
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    model = tiny(config)
    engine = TransformersEngine(model)
    state, before = engine.state(), root(engine)
    assert " but [" not in engine.identity(8).architecture
    compute(engine)
    assert (engine.state(), root(engine)) == (state, before)
    model.model.rotary_emb.original_inv_freq *= 2
    assert root(engine) != before


def test_a_compiled_model_is_the_same_model() -> None:
    plain = TransformersEngine(build("llama"))
    compiled, in_place, forward = build("llama"), build("llama"), build("llama")
    in_place.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    for model in (torch.compile(compiled, backend="eager"), in_place, forward):
        engine = TransformersEngine(model)
        assert root(engine) == root(plain)
        torch.testing.assert_close(compute(engine), compute(plain))
        assert engine.state().unnamed == ""


def test_the_vocabulary_and_the_stop_tokens_are_those_of_now() -> None:
    model = build("llama")
    engine = TransformersEngine(model)
    before = root(engine)
    model.resize_token_embeddings(140)
    assert engine.vocabulary_size == 140
    engine.check_prompt([139])
    assert root(engine) != before
    assert engine.stop_tokens == {2}
    model.generation_config.eos_token_id = [7, 9]
    assert engine.stop_tokens == {7, 9}


@pytest.mark.parametrize(
    "change_it",
    [
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: setattr(model.config, "sliding_window", 9),
        lambda model: model.to("meta"),
    ],
    ids=["bfloat16", "double", "window", "device"],
)
def test_a_model_that_outgrew_its_engine_is_refused(change_it: Callable[[Any], Any]) -> None:
    model = build("mistral")
    engine = TransformersEngine(model)
    engine.state()
    change_it(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="make a new engine"):
            engine.state()


def test_what_was_cast_back_is_served_again() -> None:
    model = build("llama")
    engine = TransformersEngine(model)
    model.double()
    with pytest.raises(UnsupportedModel):
        engine.state()
    model.float()
    assert engine.state().unnamed == ""
    compute(engine)


def test_gradient_checkpointing_in_training_is_an_error_not_an_empty_cache() -> None:
    model = build("llama")
    engine = TransformersEngine(model)
    before = root(engine)
    model.gradient_checkpointing_enable()
    assert root(engine) == before, "it does nothing in evaluation mode"
    expected = compute(engine)
    model.train()
    if Version(transformers.__version__) < Version("5.24"):  # a forward does without its cache then
        with pytest.raises(UnsupportedModel, match="eval"):
            compute(engine)
    else:
        torch.testing.assert_close(compute(engine), expected)


class Extra(torch.nn.Module):
    def get_extra_state(self) -> Any:
        return object()


def test_state_that_is_no_tensor_has_no_name() -> None:
    model = build("llama")
    model.model.extra = Extra()
    assert "Extra" in TransformersEngine(model).state().unnamed


def test_a_class_that_is_not_made_of_its_configuration_alone_has_no_name() -> None:
    class Demanding(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)
            self.more = more

    assert "cannot be built" in TransformersEngine(Demanding(CONFIGS["llama"](), 3)).state().unnamed


class OwnLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, past_key_values: Any = None, **more: Any) -> Any:
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **more)


def test_somebody_s_own_class_with_the_configuration_of_another_has_no_name() -> None:
    assert "OwnLlama" in TransformersEngine(OwnLlama(CONFIGS["llama"]())).state().unnamed


def test_writes_that_cannot_be_seen_can_be_told() -> None:
    model = build("llama")
    engine = TransformersEngine(model)
    before = root(engine)
    model.model.layers[1].mlp.up_proj.weight.data[7, 3] += 1
    engine.weights_changed()
    assert root(engine) != before
