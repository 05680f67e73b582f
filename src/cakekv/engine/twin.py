"""A copy of a model that shares its weights and has other configurations, so that the model itself is not touched."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig


def twin_of(model: Any, implementation: str) -> Any:
    """The same modules over the same weights, with another implementation of attention.

    It follows changes of the weights' values, not of modules: make a new one once adapters have changed.

    Parameters
    ----------
    model : torch.nn.Module
        Not a compiled one.
    implementation : str
        What its configurations say then.
    """
    configs: dict[int, PreTrainedConfig] = {}
    modules: dict[int, Any] = {}

    def config_of(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in configs:
            other = configs[id(config)] = copy.copy(config)
            other.__dict__["_attn_implementation_internal"] = implementation
            for name, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    other.__dict__[name] = config_of(value)
        return configs[id(config)]

    def module_of(module: Any) -> Any:
        if id(module) not in modules:
            other = modules[id(module)] = copy.copy(module)
            for name, value in vars(module).items():
                if isinstance(value, PreTrainedConfig):
                    other.__dict__[name] = config_of(value)
            other.__dict__["_modules"] = {
                name: None if child is None else module_of(child) for name, child in module._modules.items()
            }
        return modules[id(module)]

    return module_of(model)
