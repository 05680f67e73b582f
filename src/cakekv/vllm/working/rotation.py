"""How a model in vLLM turns its keys by their positions: as the rotary modules do that it made when it was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cakekv.errors import UnknownRotation
from cakekv.rotation import Rotation

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding


def rotations(vllm_config: VllmConfig, layers: int) -> list[Rotation]:
    """One per layer, all the same; to be called in a worker, once the model is loaded.

    Raises
    ------
    UnknownRotation
        The model has none, several, or one that depends on more than the position; or vLLM keeps no record of it.
    """
    try:
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    except ImportError as error:
        raise UnknownRotation("this vLLM keeps no record of its rotary modules") from error
    model = vllm_config.model_config
    if not all(getattr(model.hf_text_config, "no_rope_layers", None) or [True]):
        raise UnknownRotation("some of its layers have no RoPE")
    head = model.get_head_size()
    found = {_rotation(module) for module in _ROPE_DICT.values() if module.head_size == head}
    if len(found) != 1:
        raise UnknownRotation(f"vLLM has {len(found) or 'no'} kinds of RoPE for heads of {head} elements, not one")
    return list(found) * layers


def _rotation(module: RotaryEmbedding) -> Rotation:
    from vllm.model_executor.layers import rotary_embedding as kinds

    kind = type(module)
    frequencies: torch.Tensor
    if kind in (kinds.RotaryEmbedding, kinds.Llama3RotaryEmbedding):
        frequencies = module._compute_inv_freq(module.base)
    elif kind is kinds.YaRNScalingRotaryEmbedding:
        frequencies = module._compute_inv_freq(module.scaling_factor)
    else:
        raise UnknownRotation(f"its RoPE is vLLM's {kind.__name__}, which depends on more than a token's position")
    return Rotation(tuple(frequencies.float().cpu().tolist()), interleaved=not module.is_neox_style)
