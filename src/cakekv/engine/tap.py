"""A tap on a model's attention: a registered attention function hands each layer's queries, keys and values to us.

The model is not touched. A twin of it, which shares its weights, is configured for our attention function; that one
calls the function which the model itself would have called, with what the tap's `Hand` gives it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cakekv.engine.twin import twin_of
from cakekv.errors import UnsupportedModel

_MASKED = {"sdpa": "sdpa", "eager": "eager"}
"""What the twin attends with, by what the model does: the kernels of the others take no mask, and sdpa is used."""
_NAMES = {inner: f"cakekv_{inner}" for inner in dict.fromkeys(_MASKED.values())}


@dataclass
class Attending:
    """One layer's attention in one forward.

    Attributes
    ----------
    layer : int
        The model's number of the layer, as `layer_idx` of its attention.
    query : Tensor
        (1, heads, tokens, width), after RoPE.
    key, value : Tensor
        (1, kv_heads, positions, width): what the cache's layer has returned.
    mask : Tensor or None
        As the model made it.
    additive : bool
        Whether a mask has to be added to the logits; else it may be boolean, True where to attend.
    scaling : float
        What products are multiplied with.
    softcap : float or None
        Logits are capped to that, if not None.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    additive: bool
    scaling: float
    softcap: float | None
    _attend: Callable[..., Any]

    def attend(self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The model's attention over these keys and values; (1, tokens, heads, width). A boolean mask will do.

        There may be as many heads of keys as of queries.
        """
        if mask is not None and mask.dtype is torch.bool and self.additive:
            mask = torch.zeros(mask.shape, dtype=self.query.dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(self.query.dtype).min
            )
        elif mask is not None and mask.dtype is not torch.bool:
            mask = mask.to(self.query.dtype)
        output: torch.Tensor = self._attend(self.query, key, value, mask)[0]
        return output

    def ordinary(self) -> torch.Tensor:
        """What the model's attention returns without a tap."""
        output: torch.Tensor = self._attend(self.query, self.key, self.value, self.mask)[0]
        return output


Hand = Callable[[Attending], torch.Tensor]
"""Returns what attention does: (1, tokens, heads, width)."""

_HANDS = threading.local()


class Tap:
    """Runs forwards of one model whose attention goes through a hand.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model; of a compiled one, what was compiled.

    Raises
    ------
    UnsupportedModel
        Its attention cannot be tapped, with the reason.
    """

    def __init__(self, model: Any) -> None:
        said = model.config.get_text_config(decoder=True)._attn_implementation
        if said not in (
            "sdpa",
            "eager",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
            "flex_attention",
        ):
            raise UnsupportedModel(
                f"its attention is {said!r}, which cannot be tapped: load it with attn_implementation='sdpa'"
            )
        inner = _MASKED.get(said, "sdpa")
        self.twin = twin_of(model, _NAMES[inner])

    @contextmanager
    def handing(self, hand: Hand) -> Iterator[Any]:
        """Within the `with` block, in this thread, forwards of the twin, which it gives, go through `hand`."""
        before = getattr(_HANDS, "hand", None)
        _HANDS.hand = hand
        try:
            yield self.twin
        finally:
            _HANDS.hand = before


def _function(inner: str) -> Callable[..., Any]:
    def tapped(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        function = ALL_ATTENTION_FUNCTIONS["sdpa"] if inner == "sdpa" else _eager_of(module)
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        kv_heads = key.shape[1]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Any:
            asked = module if key.shape[1] == kv_heads else _Ungrouped(module)
            return function(asked, query, key, value, mask, scaling=scaling, **options)

        hand: Hand | None = getattr(_HANDS, "hand", None)
        layer = getattr(module, "layer_idx", None)
        if hand is None or layer is None:
            return attend(query, key, value, attention_mask)  # type: ignore[no-any-return]
        attending = Attending(
            layer, query, key, value, attention_mask, inner == "eager", scaling, options.get("softcap"), attend
        )
        return hand(attending), None

    return tapped


class _Ungrouped:
    """A module of attention as it is, but for that each query has keys of its own."""

    num_key_value_groups = 1

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _eager_of(module: Any) -> Callable[..., Any]:
    """What a model's own file calls for eager attention."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedModel(f"{type(module).__name__} has no eager_attention_forward to tap")


for _inner, _name in _NAMES.items():
    AttentionInterface.register(_name, _function(_inner))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_inner])
