"""Whether a live model is still what it was: a look at everything its forward depends on that costs well under a
millisecond, because it compares what is there with what was there and computes nothing from it."""

from __future__ import annotations

import operator
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OTHER_HOOKS = {name for name in vars(torch.nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))}
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_SIMPLE = (type(None), bool, int, float, str, dict, list, tuple, set, OrderedDict)
_RUN_BYTES = 32
_MOST_DERIVED_BYTES = 1 << 20
_version = operator.attrgetter("_version")


def modules_of(model: Any) -> dict[str, Any]:
    """All of a model's modules by their paths, each once; much faster than `named_modules`."""
    found: dict[int, tuple[str, Any]] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = path, module
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in module._modules.items() if child is not None]
    return dict(found.values())


def configs_of(modules: dict[str, Any]) -> list[Any]:
    """The configurations that modules hold, each once, with those inside them."""
    waiting = [value for module in modules.values() for value in vars(module).values() if type(value) not in _SIMPLE]
    found: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if id(value) not in found and isinstance(value, PreTrainedConfig):
            found[id(value)] = value
            waiting += [inner for inner in vars(value).values() if type(inner) not in _SIMPLE]
    return list(found.values())


def classes_of(modules: dict[str, Any]) -> list[type]:
    """The classes whose code the modules run, but for torch's own."""
    classes = {base for kind in set(map(type, modules.values())) for base in kind.__mro__}
    return sorted((one for one in classes if not _is_torch(one)), key=lambda one: (one.__module__, one.__qualname__))


def namespaces_of(modules: dict[str, Any]) -> list[dict[str, Any]]:
    """The global names that the modules' code may use, and `torch.nn.functional`'s."""
    names = sorted({type(module).__module__ for module in modules.values() if not _is_torch(type(module))})
    return [vars(functional), *(vars(sys.modules[name]) for name in names if name in sys.modules)]


def global_hooks() -> list[Any]:
    """The hooks that torch calls for every module."""
    return [hooks for name in _GLOBAL_HOOKS for hooks in getattr(torch.nn.modules.module, name).values()]


def settings() -> tuple[str, ...]:
    """How precisely this process multiplies matrices of float32, if not in full: by CUDA, and by the CPU."""
    try:
        get = torch._C._get_fp32_precision_getter
        precisions = [get("cuda", "matmul"), get("mkldnn", "matmul")]
    except (AttributeError, RuntimeError):  # an older torch
        precisions = [torch.get_float32_matmul_precision()] * 2
    return tuple("" if one in ("none", "ieee", "highest") else one for one in precisions)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors in memory that a tensor consists of: itself, or those inside a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def write_count(tensor: torch.Tensor) -> int | None:
    """How often torch counted a write to a tensor; None if it does not count (made in inference mode)."""
    return None if tensor.is_inference() else tensor._version


def form_of(model: Any) -> Any:
    """What the model's layers keep follows from: its configurations, and the types and shapes of its weights."""
    configs = [deepcopy(vars(config)) for config in configs_of(modules_of(model))]
    return configs, [(tensor.dtype, tensor.shape) for tensor in model.parameters()]


class Stamps:
    """What a model's forward depends on, as it was at one moment.

    Of tensors there are the object, its version, which torch counts up at every write, its address, and a few of its
    bytes. The bytes are for writes that torch does not count: those through `.data` and through NumPy. Such a write to
    a few elements only may go unseen.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Attributes
    ----------
    weights : list of Tensor
        The parameters, and the buffers that are saved with them.
    """

    def __init__(self, model: Any) -> None:
        modules = modules_of(model)
        self._attributes = [vars(module) for module in modules.values()]
        self._copies = [_copy(attributes) for attributes in self._attributes]
        hooks = [attributes[name] for attributes in self._attributes for name in _HOOKS]
        hooks += [getattr(torch.nn.modules.module, name) for name in _GLOBAL_HOOKS]
        self._hooks = [(held, dict(held)) for held in hooks if held]
        self._no_hooks = [held for held in hooks if not held]
        registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        names = [*map(vars, classes_of(modules)), *namespaces_of(modules)]
        names += [mapping for one in registries for mapping in (one._global_mapping, one._local_mapping)]
        self._names = [(held, dict(held)) for held in names]
        self._configs = [(vars(config), deepcopy(vars(config))) for config in configs_of(modules)]
        self._settings = settings()
        derived: list[torch.Tensor] = []
        self.weights = []
        for attributes in self._attributes:
            transient = attributes["_non_persistent_buffers_set"]
            self.weights += attributes["_parameters"].values()
            for name, buffer in attributes["_buffers"].items():
                (derived if name in transient else self.weights).append(buffer)
            derived += [value for value in attributes.values() if isinstance(value, torch.Tensor)]
        self.weights = _distinct(self.weights)
        self._watched = [inner for tensor in self.weights for inner in plain_tensors(tensor)]
        self._tracked = [tensor for tensor in self._watched if not tensor.is_inference()]
        self._versions = [*map(_version, self._tracked)]
        self._addresses = _addresses(self._watched)
        self._runs = [[*_runs(tensor)] for tensor in self._watched]
        self._by_device: dict[torch.device, list[torch.Tensor]] = {}
        for run in chain.from_iterable(self._runs):
            self._by_device.setdefault(run.device, []).append(run)
        self._run_bytes = [_joined(runs) for runs in self._runs]
        self._bytes = self._sample()
        self._derived = [each for each in _distinct(derived) if not each.is_inference() and not each.is_meta]
        self._derived_versions = [*map(_version, self._derived)]
        self._derived_values = [
            each.detach().clone() if each.nbytes <= _MOST_DERIVED_BYTES else None for each in self._derived
        ]

    def hold(self) -> bool:
        """Whether all is as it was."""
        try:
            return (
                not any(self._no_hooks)
                and all(held == copy for held, copy in self._hooks)
                and all(map(operator.eq, self._attributes, self._copies))
                and self.weights_hold()
                and all(held == copy for held, copy in self._names)
                and all(held == copy for held, copy in self._configs)
                and self._settings == settings()
                and self._derived_hold()
            )
        except (RuntimeError, TypeError, ValueError):  # what was replaced, tensors for instance, cannot be compared
            return False

    def weights_hold(self) -> bool:
        """Whether nothing was written to the tensors that were the weights."""
        return (
            [*map(_version, self._tracked)] == self._versions
            and _addresses(self._watched) == self._addresses
            and all(map(torch.equal, self._sample(), self._bytes))
        )

    def silent_writes(self) -> bool:
        """Whether a weight's bytes changed without torch having counted a write to it."""
        counts = {id(tensor): version for tensor, version in zip(self._tracked, self._versions, strict=True)}
        for tensor, address, runs, before in zip(
            self._watched, self._addresses, self._runs, self._run_bytes, strict=True
        ):
            counted = write_count(tensor) != counts.get(id(tensor)) or tensor.data_ptr() != address
            if not counted and _joined(runs) != before:
                return True
        return False

    def _sample(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [*map(torch.cat, self._by_device.values())]

    def _derived_hold(self) -> bool:
        """Whether the buffers that follow from the configuration have the values they had.

        Some models write them anew, and the same, in every forward.
        """
        versions = [*map(_version, self._derived)]
        if versions != self._derived_versions:
            for tensor, old, new, value in zip(
                self._derived, self._derived_versions, versions, self._derived_values, strict=True
            ):
                if old != new and (value is None or not torch.equal(tensor, value)):
                    return False
            self._derived_versions = versions
        return True


def _is_torch(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in ("torch", "typing", "abc", "builtins")


def _distinct(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes, with copies of what may be changed in place. Hooks are looked at by themselves."""
    return {name: value if name in _OTHER_HOOKS else _frozen(value) for name, value in attributes.items()}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    if type(value) in (list, set):
        return type(value)(map(_frozen, value)) if type(value) is list else set(value)
    return value


def _joined(runs: list[torch.Tensor]) -> bytes:
    return b"".join(bytes(run.tolist()) for run in runs)


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]


def _runs(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a few bytes of a tensor's memory: of its beginning, its middle and its end."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return
    size = tensor.numel() * tensor.element_size()
    start = tensor.storage_offset() * tensor.element_size()
    end = min(start + size, tensor.untyped_storage().nbytes())
    for first in {start, start + size // 2, end - _RUN_BYTES}:
        if start <= first < end:
            length = (min(_RUN_BYTES, end - first),)
            run = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            yield run.set_(tensor.untyped_storage(), first, length)  # type: ignore[call-overload]
