"""Which models can be restored from chunks, why the others cannot, and what each of their layers keeps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch

from cakekv.engine.cache import LayerShape, Plane
from cakekv.engine.versions import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    cache_arguments,
    explain_if_newer,
)
from cakekv.errors import UnsupportedModel

_NOT_CAUSAL = "its attention is not causal: a token's keys and values depend on later tokens"


def check_config(config: Any) -> None:
    """Refuse, from its configuration alone, a model whose state cannot be cut into per-token chunks.

    Raises
    ------
    UnsupportedModel
        With the reason.
    """
    if config.is_encoder_decoder:
        raise _refusal(config, "an encoder-decoder's cross-attention depends on more than the tokens so far")
    text = config.get_text_config(decoder=True)
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise _refusal(config, _NOT_CAUSAL)
    _recorders(config)


def probe(model: Any) -> list[LayerShape | None]:
    """Find out what each layer keeps by running a few tokens through the model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.

    Returns
    -------
    list of LayerShape or None
        One per layer; None for a layer that keeps nothing.

    Raises
    ------
    UnsupportedModel
        The model's state cannot be cut into per-token chunks, with the reason.
    """
    config = model.config
    check_config(config)
    if getattr(model, "_is_stateful", False):
        raise _refusal(config, "it carries a running state from token to token")
    name, recorders = cache_argument(model), _recorders(config)
    first, second = (_first_logits(model, recorders, tokens, name) for tokens in ([1, 1], [1, 2]))
    # The token before is the same, so any difference is one of rounding, unless the model looks ahead.
    rounding = 16 * torch.finfo(first.dtype).eps * first.abs().max()
    if bool((first - second).abs().max() > rounding):
        raise _refusal(config, _NOT_CAUSAL)
    shapes = [_shape(recorder, index, model) for index, recorder in enumerate(recorders)]
    if not any(shapes):
        raise _refusal(config, "none of its layers keeps keys and values")
    return shapes


def cached_keys(model: Any, tokens: list[int]) -> list[torch.Tensor]:
    """What a model caches as keys of these tokens, of each layer that caches any: (heads, tokens, width), float32."""
    recorders = _recorders(model.config)
    _first_logits(model, recorders, tokens, cache_argument(model))
    return [recorder.seen[0][0][0].to("cpu", torch.float32) for recorder in recorders if recorder is not None]


def cache_argument(model: Any) -> str:
    """The name under which the model's forward takes its cache.

    Raises
    ------
    UnsupportedModel
        It takes none.
    """
    names = cache_arguments(model.forward)
    for name in names:
        recorders = _recorders(model.config)
        if len(names) > 1:  # it takes any argument, and need not use this one
            with suppress(UnsupportedModel):
                _first_logits(model, recorders, [1], name)
        if len(names) == 1 or any(recorder is not None and recorder.seen for recorder in recorders):
            return name
    raise _refusal(model.config, f"{type(model).__name__} takes no KV cache")


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(model.forward).parameters


def _first_logits(model: Any, recorders: Sequence[_Recorder | None], tokens: list[int], name: str) -> torch.Tensor:
    """The first token's logits in a forward over an empty cache, which is passed under this name."""
    cache = Cache(layers=[DummyLayer() if recorder is None else recorder for recorder in recorders])
    try:
        with torch.inference_mode():
            input_ids = torch.tensor([tokens], device=model.device)
            output = model(input_ids=input_ids, use_cache=True, return_dict=True, **{name: cache})
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        raise _refusal(model.config, f"its forward fails on a few tokens and an empty cache: {error!r}") from error
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3:
        raise _refusal(model.config, f"{type(model).__name__} has no language-model head")
    return logits[0, 0]  # type: ignore[no-any-return]


class _Recorder(DynamicLayer):  # type: ignore[misc]
    """A layer's cache that stays empty and notes what forwards hand it."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((key_states, value_states))
        return key_states, value_states


def _recorders(config: Any) -> list[_Recorder | None]:
    """One per layer, with its window, as transformers' own cache has it; None for a layer that keeps nothing.

    A window that the configuration class does not declare is ignored: the model's attention does not know of it, only
    the cache would (a Llama checkpoint whose config.json has a left-over `sliding_window`, for example).
    """
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise _refusal(config, f"transformers cannot tell what its layers keep ({error!r})") from error
    declared = {field.name for field in fields(config.get_text_config(decoder=True))}
    windowed = not declared.isdisjoint({"sliding_window", "attention_chunk_size"})
    recorders: list[_Recorder | None] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            reason = f"its layer {index} keeps a running state (state space, linear attention or convolution)"
            raise _refusal(config, reason)
        if isinstance(layer, DynamicIndexedLayer):
            raise _refusal(config, f"its layer {index} keeps a sparse-attention index beside its keys and values")
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise _refusal(config, f"its layer {index} keeps its state in a {type(layer).__name__}")
        window = getattr(layer, "sliding_window", None) if windowed else None
        recorders.append(None if type(layer) is DummyLayer else _Recorder(window))
    return recorders


def _shape(recorder: _Recorder | None, index: int, model: Any) -> LayerShape | None:
    if recorder is None:
        return None
    if len(recorder.seen) != 2:
        raise _refusal(model.config, f"its layer {index} does not write its cache exactly once in a forward")
    keys, values = recorder.seen[0]
    for states in (keys, values):
        if states.ndim != 4 or states.shape[0] != 1 or states.shape[2] != 2:
            raise _refusal(model.config, f"its layer {index} keeps {tuple(states.shape)} for two tokens")
        if states.device != model.device:
            raise _refusal(model.config, f"its layer {index} is on {states.device}, its first layer on {model.device}")
    return LayerShape(
        Plane(keys.shape[1], keys.shape[3], keys.dtype),
        Plane(values.shape[1], values.shape[3], values.dtype),
        recorder.window,
    )


def _refusal(config: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{config.model_type} is not supported, because {reason}{explain_if_newer()}")
