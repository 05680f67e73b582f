"""Who a live model is: the parts of its `Identity` that are found in its tensors, configuration and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cakekv.errors import BadInput
from cakekv.keys import canonical, fingerprint_tensors
from cakekv.layout import KVLayout

# Everything in a configuration counts unless it is known not to change keys and values. The dtype has a field of its
# own in `Identity`; class names differ between a model just built and the same model saved and loaded.
_IRRELEVANT = frozenset(
    [
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "tokenizer_class",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
    ]
)


def architecture(config: Any) -> str:
    """The model's configuration as far as it can change keys and values, as stable text."""
    return canonical(_relevant(json.loads(config.to_json_string(use_diff=False))))


def layout_text(layout: KVLayout) -> str:
    """The shape of the model's chunks, as stable text."""
    return canonical(asdict(layout))


def weights_fingerprint(model: Any) -> str:
    """Fingerprint of all of a model's tensors but its adapters'.

    Raises
    ------
    BadInput
        Some tensors are not in memory.
    """
    adapters = set(getattr(model, "peft_config", ()))
    return fingerprint_tensors(
        _entries((name, tensor) for name, tensor in _named_tensors(model) if adapters.isdisjoint(name.split(".")))
    )


def adapter_fingerprint(model: Any) -> str:
    """Fingerprint of the PEFT adapters in use (their tensors, settings and whether they are merged); "" for none."""
    states = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            active = [] if module.disable_adapters else list(module.active_adapters)
            states[name] = [active, list(module.merged_adapters), getattr(module, "scaling", None)]
            used.update(active, module.merged_adapters)
    if not used:
        return ""
    settings = {name: model.peft_config[name].to_dict() for name in used}
    description = json.dumps([states, settings], sort_keys=True, default=_plain).encode()
    tensors = _entries((name, tensor) for name, tensor in _named_tensors(model) if used & set(name.split(".")))
    return fingerprint_tensors([("settings", "json", (), description), *tensors])


def _named_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the model, by the names they have without adapters."""
    for name, tensor in model.state_dict().items():
        parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
        yield ".".join(parts), tensor


def _entries(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, str, tuple[int, ...], npt.NDArray[np.uint8]]]:
    for name, tensor in tensors:
        if tensor.is_meta:
            raise BadInput(f"{name} is not in memory, so the model cannot be identified; load it without offloading")
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        yield name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _relevant(item) for key, item in value.items() if key not in _IRRELEVANT}
    return [_relevant(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
