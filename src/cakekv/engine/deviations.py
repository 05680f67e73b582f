"""What a live model does otherwise than its configuration says: what can be named, and what cannot.

A model of the same class is built from the configuration, without weights, and the two are compared module by module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from blake3 import blake3
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cakekv.engine.stamps import classes_of, configs_of, global_hooks, modules_of, namespaces_of, settings
from cakekv.errors import BadInput

WRAPPED = ("base_layer", "original_module", "_orig_mod")
"""Children that are the model's own module, inside one that PEFT or torch.compile put around it."""

_LIBRARIES = {"torch", "transformers", "peft", "torchao", "bitsandbytes", "optimum", "gptqmodel", "awq"}
_LIBRARIES |= {"compressed_tensors", "accelerate", "kernels", "huggingface_hub", "numpy", "einops", "safetensors"}
_LIBRARIES |= {"tokenizers"}
"""Whose code is taken to do what its name says."""
_ALIKE = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
"""Attention implementations that differ by rounding only, as a rule."""
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)
"""They compute nothing, so it does not matter whether they train."""
_IGNORED = {
    *vars(torch.nn.Module()),
    *("_is_hf_initialized", "_compiled_call_impl", "_hf_hook", "_old_forward"),
    *("gradient_checkpointing", "_gradient_checkpointing_func", "extra_repr"),
}
_IGNORED_OF_MODELS = {"name_or_path", "warnings_issued", "generation_config", "_hf_peft_config_loaded", "peft_config"}


@dataclass
class Deviations:
    """What a model does otherwise than its configuration says.

    Attributes
    ----------
    named : list
        Plain data that tells one such model from another.
    unnamed : list of str
        What no name can be given to, in words: "its module model.norm has a hook".
    """

    named: list[Any] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


class Blank:
    """A model as its configuration makes it, without weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of which class, with which configuration.

    Attributes
    ----------
    modules : dict or None
        By path. Of the buffers that are not saved with the weights, those that transformers itself computes after
        loading weights are there, and no others. None if the class cannot be built from its configuration alone.
    """

    def __init__(self, model: Any) -> None:
        self._kind = type(model)
        self._config = deepcopy(vars(model.config))
        self.modules: dict[str, Any] | None = None
        try:
            with _unseeded(), torch.device("meta"), torch.no_grad():
                blank = self._kind(deepcopy(model.config)).eval()
            self.modules = modules_of(blank)
            for module, owner in _with_owners(blank, blank):
                with _unseeded(), torch.no_grad():
                    _initialise_buffers(module, owner)
        except Exception:  # it is somebody else's code: anything may be raised
            self.modules = None

    def is_of(self, model: Any) -> bool:
        """Whether it is still what the model's configuration makes."""
        return type(model) is self._kind and bool(vars(model.config) == self._config)


def find_deviations(model: Any, blank: Blank) -> Deviations:
    """Compare a model with its configuration.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. PEFT's adapters in it are no deviations.
    blank : Blank
        What its configuration makes.
    """
    found = Deviations()
    modules = modules_of(model)
    if any(module.training for module in modules.values() if not isinstance(module, _CONTAINERS)):
        found.unnamed.append("it is in training mode, in which dropout is at work (model.eval() ends that)")
    for path, module in modules.items():
        found.unnamed += [f"{_where(path)} has a hook ({_name(hook)})" for hook in _hooks(module)]
    found.unnamed += [f"torch calls a hook ({_name(hook)}) for every module" for hook in global_hooks()]
    if blank.modules is None:
        found.unnamed.append(f"{type(model).__name__} cannot be built from its configuration, to compare it with that")
    else:
        own = dict(own_modules(model))
        quantised = getattr(model, "hf_quantizer", None) is not None
        for path, module in own.items():
            _compare(path, module, blank.modules.get(path), quantised, found)
        if not quantised:
            found.named += [[path, "missing"] for path in sorted(blank.modules.keys() - own.keys())]
    _compare_code(model, modules, found)
    for config in configs_of(modules):
        _compare_attention(config, found)
    if any(settings()):
        found.named.append(["precision of float32 products", *settings()])
    return found


def surroundings(device: torch.device) -> str:
    """What of the calling thread's settings makes a forward compute something else, in words; "" for nothing."""
    if torch.is_autocast_enabled(device.type):
        return f"autocast to {str(torch.get_autocast_dtype(device.type))[6:]} is on around the call"
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    others = [type(mode).__name__ for mode in modes if type(mode).__name__ != "DeviceContext"]
    if torch._C._len_torch_dispatch_stack():
        others.append("a dispatch mode of torch")
    return f"{others[0]} is on around the call" if others else ""


def own_modules(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A model's modules by the paths they have without adapters, and none of the adapters'."""
    inner = next((module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None)
    if inner is not None:
        yield from own_modules(inner, path)
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from own_modules(child, f"{path}.{name}" if path else name)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of a tensor's type, shape and values.

    Raises
    ------
    BadInput
        It is not in memory.
    """
    if tensor.is_meta:
        raise BadInput("a buffer is not in memory, so the model cannot be identified; load it without offloading")
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(f"{tensor.dtype}{tuple(tensor.shape)}".encode()).update(data.data).hexdigest(16)


def _compare(path: str, module: Any, expected: Any, quantised: bool, found: Deviations) -> None:
    """Note in what a module differs from the one that the configuration makes of it."""
    kind = type(module)
    if type(expected) is not kind:
        if not _is_library(kind.__module__):
            found.unnamed.append(f"{_where(path)} is a {kind.__qualname__}, which its configuration does not make")
            return
        if quantised:  # as the configuration's quantization_config says
            return
        found.named.append([path, kind.__module__, kind.__qualname__])
    held, usual = vars(module), {} if type(expected) is not kind else vars(expected)
    ignored = set(_IGNORED)
    if isinstance(module, PreTrainedModel):
        ignored |= _IGNORED_OF_MODELS | {name for name in held.keys() - usual.keys() if not hasattr(kind, name)}
    if hasattr(module, "rope_type"):  # it changes with the prompt's length, and follows from the configuration
        ignored |= {name for name in held if name.endswith(("long_inv_freq", "max_seq_len_cached"))}
    for name in sorted((held.keys() | usual.keys()) - ignored):
        if name not in held:
            found.named.append([path, name, "missing"])
        elif name in usual and _alike(held[name], usual[name]):
            continue
        elif not (name == "forward" and _runs_own_forward(module)):
            value = _named(held[name])
            if value is None:
                found.unnamed.append(f"{_where(path)} has another {name} ({_name(held[name])})")
            else:
                found.named.append([path, name, value])
    transient = module._non_persistent_buffers_set
    for name, tensor in module._buffers.items():
        if name in transient and tensor is not None:
            initial = usual.get("_buffers", {}).get(name)
            if initial is None or not _close(tensor, initial):
                found.named.append([path, name, tensor_digest(tensor)])


def _compare_code(model: Any, modules: dict[str, Any], found: Deviations) -> None:
    """Note classes and functions that were replaced by somebody else's."""
    home = type(model.config).__module__.partition(".")[0]
    for kind in classes_of(modules):
        library = kind.__module__.partition(".")[0]
        if home == "transformers" and not _is_library(kind.__module__):
            found.unnamed.append(f"it has modules of the class {kind.__qualname__}, which is not transformers'")
        for name, value in list(vars(kind).items()):
            foreign = _foreign(value, library)
            if foreign:
                found.unnamed.append(f"{kind.__qualname__}.{name} was replaced by a function of {foreign}")
    for names in namespaces_of(modules):
        library = names["__name__"].partition(".")[0]
        if not _is_library(library):
            continue
        for name, value in list(names.items()):
            foreign = _foreign(value, library)
            if foreign:
                found.unnamed.append(f"{names['__name__']}.{name} was replaced by a function of {foreign}")


def _compare_attention(config: Any, found: Deviations) -> None:
    """Note an attention implementation that computes something else than the model's usual one."""
    name = getattr(config, "_attn_implementation", None)
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        foreign = _foreign(registry.get(name), "transformers")
        if foreign:
            found.unnamed.append(f"the attention implementation {name} is a function of {foreign}")
    biased = config.model_type == "falcon" and getattr(config, "alibi", False)
    if name not in _ALIKE or (biased and name != "sdpa"):  # without sdpa, Falcon scales ALiBi's biases, too
        found.named.append(["attention implementation", name])


def _hooks(module: Any) -> Iterator[Any]:
    """A module's hooks, but for those by which transformers collects what it was asked for."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                yield hook


def _runs_own_forward(module: Any) -> bool:
    """Whether a module's own `forward` is its class's, compiled or in a wrapper that only moves tensors."""
    forward = vars(module)["forward"]
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if type(vars(module).get("_hf_hook")).__module__ == "accelerate.hooks":
        forward = vars(module).get("_old_forward", forward)
    return isinstance(forward, MethodType) and forward.__func__ is type(module).forward


def _foreign(value: Any, library: str) -> str | None:
    """The library that a function is from, if it is neither `library` nor one that we know."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if not isinstance(value, FunctionType):
        return None
    home = str(value.__globals__.get("__name__", "")).partition(".")[0]
    if home in sys.stdlib_module_names and home != "__main__":  # a decorator, or a helper
        return _foreign(getattr(value, "__wrapped__", None), library)
    return None if home == library or _is_library(home) else home or "nobody knows where"


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _alike(value: Any, other: Any) -> bool:
    """Whether two attributes are the same, as far as their values tell, else their code."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_alike(item, other[name]) for name, item in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_alike, value, other))
    if isinstance(value, PreTrainedConfig):
        return bool(vars(value) == vars(other))
    if isinstance(value, partial):
        return _alike((value.func, value.args, value.keywords), (other.func, other.args, other.keywords))
    if isinstance(value, MethodType):
        return value.__func__ is other.__func__
    if isinstance(value, FunctionType):
        return value.__code__ is other.__code__ and _alike(_cells(value), _cells(other))
    if isinstance(value, torch.Tensor):
        return not other.is_meta and value.shape == other.shape and torch.equal(value.cpu(), other.cpu())
    if isinstance(value, torch.nn.Module):
        return True  # one that is not registered; its class is the same
    try:
        if value == other:
            return True
    except Exception:  # it may be anything
        return False
    if getattr(type(value), "__eq__", None) is not object.__eq__:
        return False
    return _alike(getattr(value, "__dict__", None), getattr(other, "__dict__", None))


def _cells(function: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _named(value: Any) -> Any:
    """Plain data that stands for a value; None if there is none."""
    if isinstance(value, torch.Tensor):
        return tensor_digest(value)
    if isinstance(value, torch.dtype | torch.device | float) or value is None:
        return str(value)
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple | set):
        items = [_named(item) for item in (sorted(value, key=str) if isinstance(value, set) else value)]
        return None if None in items else items
    if isinstance(value, dict):
        pairs = [[str(name), _named(item)] for name, item in value.items()]
        return None if any(item is None for _, item in pairs) else sorted(pairs, key=str)
    return None


def _close(tensor: torch.Tensor, usual: torch.Tensor) -> bool:
    """Whether they differ by no more than processors do."""
    if tensor.is_meta or tensor.shape != usual.shape:
        return False
    if not tensor.is_floating_point():
        return torch.equal(tensor.cpu(), usual)
    usual = usual.to(tensor.dtype).double()
    return torch.allclose(tensor.cpu().double(), usual, rtol=8 * torch.finfo(tensor.dtype).eps, atol=0.0)


def _with_owners(module: Any, owner: Any) -> Iterator[tuple[Any, Any]]:
    """All modules, each with the model whose `_init_weights` knows it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield module, owner
    for child in module._modules.values():
        if child is not None:
            yield from _with_owners(child, owner)


def _initialise_buffers(module: Any, owner: Any) -> None:
    """Give a blank module the buffers that are not saved, as transformers itself does; drop those that it does not."""
    names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
    values: list[dict[str, torch.Tensor]] = []
    for filler in (0, 1) if names else ():
        for name in names:
            module._buffers[name] = torch.full_like(module._buffers[name], filler, device="cpu")
        owner._init_weights(module)
        values.append({name: module._buffers[name].clone() for name in names})
    for name in names:
        if not torch.equal(values[0][name], values[1][name]):
            del module._buffers[name]


@contextmanager
def _unseeded() -> Iterator[None]:
    """Leave the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        yield


def _where(path: str) -> str:
    return f"its module {path}" if path else "it"


def _name(value: Any) -> str:
    if isinstance(value, partial):
        value = value.func
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def unnamed_text(reasons: Iterable[str]) -> str:
    """A few of the reasons, in one sentence's part."""
    first, *others = dict.fromkeys(reasons)
    return f"{first}, and {len(others)} other reason(s)" if others else first
