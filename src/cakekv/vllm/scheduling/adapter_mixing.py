"""Requests without an adapter, in steps of requests with one: on CPUs, vLLM 0.32 computes them with an adapter, too."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_LOG = logging.getLogger("vllm.cakekv")


def mixes_adapters(vllm_config: VllmConfig) -> bool:
    """Whether this engine does so; if it does, that is logged."""
    if vllm_config.lora_config is None or vllm_config.device_config.device_type != "cpu" or not operators_mix():
        return False
    _LOG.warning(
        "cakekv: this vLLM computes prompts without an adapter wrongly in steps that also compute one with an adapter "
        "(on CPUs; vLLM 0.33 does not): what is computed so is not saved"
    )
    return True


def operators_mix() -> bool:
    """Whether vLLM's operators for CPUs take -1, for no adapter, for the last of the places for adapters."""
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    out = torch.zeros(1, 1)
    lora_ops.bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1), out, torch.tensor([-1]))
    return bool(out.item())
