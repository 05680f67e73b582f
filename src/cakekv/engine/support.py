"""Which models can be restored from chunks, why the others cannot, and what each of their layers keeps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from cakekv.engine.cache import LayerShape, Plane
from cakekv.errors import UnsupportedModel


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
        raise _refusal(config, "its attention is not causal: a token's keys and values depend on later tokens")
    layer_windows(config)


def layer_windows(config: Any) -> list[int | type[DummyLayer] | None]:
    """Each layer's window (None: it sees everything), or `DummyLayer` for a layer that keeps nothing of its own.

    Raises
    ------
    UnsupportedModel
        Some layer keeps something else than keys and values per token.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise _refusal(config, f"transformers cannot tell what its layers keep ({error!r})") from error
    windows: list[int | type[DummyLayer] | None] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            raise _refusal(
                config, f"its layer {index} keeps a running state (state space, linear attention or convolution)"
            )
        if isinstance(layer, DynamicIndexedLayer):
            raise _refusal(config, f"its layer {index} keeps a sparse-attention index beside its keys and values")
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DummyLayer:
            windows.append(DummyLayer)
        else:
            raise _refusal(config, f"its layer {index} keeps its state in a {type(layer).__name__}")
    return windows


class _RecordingLayer(DynamicLayer):  # type: ignore[misc]
    """Notes what a forward of one token hands it."""

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


def probe(model: Any) -> list[LayerShape | None]:
    """Find out what each layer keeps by running one token through the model.

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
    if not accepts(model, "past_key_values"):
        raise _refusal(config, f"{type(model).__name__} takes no KV cache")
    layers = [
        DummyLayer() if window is DummyLayer else _RecordingLayer(window)  # type: ignore[arg-type]
        for window in layer_windows(config)
    ]
    with torch.inference_mode():
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        output = model(input_ids=token, past_key_values=Cache(layers=layers), use_cache=True, return_dict=True)
    if getattr(output, "logits", None) is None or output.logits.ndim != 3:
        raise _refusal(config, f"{type(model).__name__} has no language-model head")
    shapes = [None if isinstance(layer, DummyLayer) else _shape(layer, i, model) for i, layer in enumerate(layers)]
    if not any(shapes):
        raise _refusal(config, "none of its layers keeps keys and values")
    return shapes


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(model.forward).parameters


def _shape(layer: _RecordingLayer, index: int, model: Any) -> LayerShape:
    if len(layer.seen) != 1:
        raise _refusal(model.config, f"its layer {index} writes its cache {len(layer.seen)} times in one forward")
    planes = []
    for states in layer.seen[0]:
        if states.ndim != 4 or states.shape[0] != 1 or states.shape[2] != 1:
            raise _refusal(model.config, f"its layer {index} keeps {tuple(states.shape)} for one token")
        if states.device != model.device:
            raise _refusal(model.config, f"its layer {index} is on {states.device} and its start on {model.device}")
        planes.append(Plane(states.shape[1], states.shape[3], states.dtype))
    return LayerShape(*planes, layer.window)


def _refusal(config: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{config.model_type} is not supported, because {reason}")
