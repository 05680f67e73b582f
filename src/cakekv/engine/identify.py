"""Who a live model is: the parts of its `Identity` that are found in its tensors, configuration and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from cakekv.config_fields import lasting_fields
from cakekv.engine.stamps import write_count
from cakekv.engine.versions import first_names
from cakekv.errors import BadInput
from cakekv.keys import canonical, content_digest, fingerprint_digests
from cakekv.layout import KVLayout

# Everything in a configuration counts unless it is known not to change keys and values. The dtype has a field of its
# own in `Identity`; class names differ between a model just built and the same model saved and loaded.
_IRRELEVANT = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
    *("id2label", "label2id", "problem_type", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode"),
}


class UnnamedState(Exception):
    """A model holds state that no key can be made of; the message says which."""


def architecture(config: Any) -> str:
    """The model's configuration as far as it can change keys and values, as stable text."""
    return canonical(_relevant(lasting_fields(config, lambda one: json.loads(one.to_json_string(use_diff=False)))))


def layout_text(layout: KVLayout) -> str:
    """The shape of the model's chunks, as stable text."""
    return canonical(asdict(layout))


class Digests:
    """Digests of tensors' contents. A tensor is read again only if something was written to it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, tuple[int | None, int], str]] = {}

    def of(self, tensor: torch.Tensor) -> str:
        """The digest of a tensor that has memory of its own."""
        state = write_count(tensor), tensor.data_ptr()
        known = self._known.get(id(tensor))
        if known is None or known[0] is not tensor or known[1] != state:
            data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            known = self._known[id(tensor)] = tensor, state, content_digest(data)
        return known[2]

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Forget all other tensors, so that they can be freed."""
        wanted = set(map(id, tensors))
        self._known = {key: known for key, known in self._known.items() if key in wanted}

    def forget(self) -> None:
        """Read everything anew."""
        self._known.clear()


def weights_fingerprint(model: Any, digests: Digests) -> str:
    """Fingerprint of all of a model's tensors but its adapters'.

    Of tensors that are not saved with the weights only the type and shape count. The frequencies of RoPE are such:
    their values follow from the configuration, and may differ by a rounding between processors; but a model cast to
    bfloat16 after it was built has them in bfloat16, and so other keys than the same model loaded as bfloat16. Those
    that do not follow from it are among the `deviations`.

    Raises
    ------
    BadInput
        Some tensors are not in memory.
    UnnamedState
        What is saved with the weights is not all tensors and plain data.
    """
    wrappers = _wrappers(model)
    weights = [(_clean(name), value) for name, value in model.state_dict().items() if not _adapter(name, wrappers)]
    saved = {name for name, _ in weights}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    derived = [
        (first_name, tensor)
        for name, tensor in model.named_buffers()
        if name not in saved and not _adapter(name, wrappers)
        for first_name in first_names(name, layers)
    ]
    entries = [(*_described(name, tensor), content_digest(b"")) for name, tensor in derived]
    return fingerprint_digests([*entries, *_entries(weights, digests)])


def adapter_fingerprint(model: Any, digests: Digests) -> str:
    """Fingerprint of the PEFT adapters in use (their tensors, settings and whether they are merged); "" for none."""
    states: dict[str, Any] = {}
    used: set[str] = set()
    beside: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if "base_layer" in module._modules and hasattr(module, "active_adapters"):
            active = [] if module.disable_adapters else list(module.active_adapters)
            states[name] = [active, list(module.merged_adapters), getattr(module, "scaling", None)]
            used.update(active, module.merged_adapters)
        elif "original_module" in module._modules and hasattr(module, "active_adapters"):
            beside[name] = [] if module.disable_adapters else list(module.active_adapters)
    # Modules that are replaced whole go with the adapters as a rule.
    states |= {name: active for name, active in beside.items() if set(active) != used}
    used.update(*beside.values())
    if not used:
        return ""
    settings = {name: _relevant(model.peft_config[name].to_dict()) for name in used}
    description = json.dumps([states, settings], sort_keys=True, default=_plain).encode()
    wrappers = _wrappers(model)
    tensors = [
        (_clean(name), value)
        for name, value in model.state_dict().items()
        if used.intersection(_adapter(name, wrappers).split("."))
    ]
    return fingerprint_digests([("settings", "json", (), content_digest(description)), *_entries(tensors, digests)])


def activated_adapter(model: Any) -> str:
    """The name of an adapter in use that is switched on by tokens of the prompt (aLoRA); "" if there is none."""
    for module in model.modules():
        if "base_layer" in module._modules and hasattr(module, "active_adapters") and not module.disable_adapters:
            for name in module.active_adapters:
                if getattr(model.peft_config.get(name), "alora_invocation_tokens", None):
                    return str(name)
    return ""


def _wrappers(model: Any) -> set[str]:
    """Paths of the modules that PEFT put around the model's own."""
    return {
        path
        for path, module in model.named_modules()
        if not module._modules.keys().isdisjoint(("base_layer", "original_module"))
    }


def _adapter(name: str, wrappers: set[str]) -> str:
    """Which part of a tensor's name lies within an adapter; "" for the model's own tensors."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in wrappers:
            return "" if parts[end] in ("base_layer", "original_module") else ".".join(parts[end:])
    return ""


def _clean(name: str) -> str:
    """The name that a tensor has without adapters."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _entries(values: Iterable[tuple[str, Any]], digests: Digests) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """What `fingerprint_digests` takes."""
    for name, value in values:
        if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
            inner, more = value.__tensor_flatten__()
            yield name, "json", (), content_digest(repr((type(value).__qualname__, more)).encode())
            yield from _entries(((f"{name}.{part}", getattr(value, part)) for part in inner), digests)
        elif isinstance(value, torch.Tensor):
            try:
                yield *_described(name, value), digests.of(value)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise UnnamedState(f"its weight {name} has a form whose bytes cannot be read ({error})") from error
        else:
            yield name, "json", (), content_digest(_text(name, value).encode())


def _text(name: str, value: Any) -> str:
    """What else than tensors is saved with a model, as stable text."""
    try:
        return canonical(str(value) if isinstance(value, torch.dtype) else value)
    except BadInput as error:
        kind = type(value).__qualname__
        raise UnnamedState(f"its state {name} is a {kind}, of which no key can be made") from error


def _described(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...]]:
    """A tensor's name, type and shape."""
    if tensor.is_meta:
        raise BadInput(f"{name} is not in memory, so the model cannot be identified; load it without offloading")
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _relevant(item) for key, item in value.items() if key not in _IRRELEVANT}
    return [_relevant(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
