"""Who a live model is: the parts of its `Identity` that are found in its tensors, configuration and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, starmap
from typing import Any

import torch

from cakekv.config_fields import lasting_fields
from cakekv.engine.versions import first_names
from cakekv.errors import BadInput
from cakekv.keys import canonical, fingerprint_tensors
from cakekv.layout import KVLayout

# Everything in a configuration counts unless it is known not to change keys and values. The dtype has a field of its
# own in `Identity`; class names differ between a model just built and the same model saved and loaded.
_IRRELEVANT = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
    *("id2label", "label2id", "problem_type", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode"),
}


def architecture(config: Any) -> str:
    """The model's configuration as far as it can change keys and values, as stable text."""
    return canonical(_relevant(lasting_fields(config, lambda one: json.loads(one.to_json_string(use_diff=False)))))


def layout_text(layout: KVLayout) -> str:
    """The shape of the model's chunks, as stable text."""
    return canonical(asdict(layout))


def weights_fingerprint(model: Any) -> str:
    """Fingerprint of all of a model's tensors but its adapters'.

    Of tensors that are not saved with the weights only the type and shape count. The frequencies of RoPE are such:
    their values follow from the configuration, and may differ by a rounding between processors; but a model cast to
    bfloat16 after it was built has them in bfloat16, and so other keys than the same model loaded as bfloat16.

    Raises
    ------
    BadInput
        Some tensors are not in memory.
    """
    adapters = set(getattr(model, "peft_config", ()))
    weights = [(name, tensor) for name, tensor in _weights(model) if adapters.isdisjoint(name.split("."))]
    saved = {name for name, _ in weights}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    derived = [
        (first_name, tensor)
        for name, tensor in model.named_buffers()
        if name not in saved
        for first_name in first_names(name, layers)
    ]
    return fingerprint_tensors(chain((_entry(*each, with_data=False) for each in derived), starmap(_entry, weights)))


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
    settings = {name: _relevant(model.peft_config[name].to_dict()) for name in used}
    description = json.dumps([states, settings], sort_keys=True, default=_plain).encode()
    tensors = [(name, tensor) for name, tensor in _weights(model) if used & set(name.split("."))]
    return fingerprint_tensors(chain([("settings", "json", (), memoryview(description))], starmap(_entry, tensors)))


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are saved with the model, by the names they have without adapters."""
    for name, tensor in model.state_dict().items():
        parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
        yield ".".join(parts), tensor


def _entry(name: str, tensor: torch.Tensor, with_data: bool = True) -> tuple[str, str, tuple[int, ...], memoryview]:
    """What `fingerprint_tensors` takes."""
    if tensor.is_meta:
        raise BadInput(f"{name} is not in memory, so the model cannot be identified; load it without offloading")
    data = memoryview(b"")
    if with_data:
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _relevant(item) for key, item in value.items() if key not in _IRRELEVANT}
    return [_relevant(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
