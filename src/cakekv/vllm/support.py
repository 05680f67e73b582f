"""What of vLLM the plug-in cannot work with, said when the engine starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cakekv.errors import UnsupportedEngine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_LOG = logging.getLogger("vllm.cakekv")

Made = TypeVar("Made", bound=Callable[..., object])

_MARK = "_cakekv_computes_while_loading"


def check_engine(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse engines whose cache or schedule cannot be restored from both ends.

    Raises
    ------
    UnsupportedEngine
        What is in the way, and how to switch it off if it can be.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, iter_layer_specs

    if vllm_config.aux_output_config.enabled:
        raise UnsupportedEngine(
            "--enable-return-routed-experts is on: which experts a token went to is not stored with its keys and "
            "values; leave it or cakekv out"
        )
    if vllm_config.attention_config.hisparse_config is not None:
        raise UnsupportedEngine(
            "HiSparse is on: it keeps a part of the KV cache in memory that cakekv does not know; switch it off, or "
            "leave cakekv out"
        )
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise UnsupportedEngine("this model has no KV cache: there is nothing to restore; leave cakekv out")
    kinds = sorted({type(spec).__name__ for group in groups for spec in iter_layer_specs(group.kv_cache_spec)})
    allowed = {"FullAttentionSpec", "MLAAttentionSpec"}
    odd = [kind for kind in kinds if kind not in allowed]
    if odd:
        raise UnsupportedEngine(
            f"this model keeps caches of the kind {', '.join(odd)}, of which only the last positions are kept or which "
            f"cannot be cut into chunks; cakekv restores {' and '.join(sorted(allowed))} only"
        )
    if len(groups) > 1:
        raise UnsupportedEngine(
            f"this model's KV cache has {len(groups)} groups of layers; cakekv restores one. Try --disable-hybrid-kv-"
            "cache-manager"
        )
    assert all(isinstance(spec, FullAttentionSpec) for spec in iter_layer_specs(groups[0].kv_cache_spec))
    if (
        vllm_config.model_config.hf_text_config.model_type == "gpt_oss"
        and vllm_config.device_config.device_type == "cpu"
    ):
        raise UnsupportedEngine(
            "this is gpt-oss on a CPU: without its hybrid allocator, which is off beside any KV connector, vLLM "
            "answers differently every time there, with or without cakekv; leave cakekv out"
        )
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise UnsupportedEngine(
                f"--{name.replace('_', '-')} is {getattr(parallel, name)}: cakekv works with 1 only; tensor and data "
                "parallelism are supported"
            )
    model = vllm_config.model_config
    multimodal = model.multimodal_config
    if multimodal is not None and not (
        multimodal.mm_processor_cache_gb or vllm_config.cache_config.enable_prefix_caching
    ):
        raise UnsupportedEngine(
            "without its prefix cache and with --mm-processor-cache-gb 0, vLLM numbers images instead of looking at "
            "them, so that one would be taken for another: switch one of the two on"
        )
    if model.is_mm_prefix_lm or vllm_config.scheduler_config.disable_chunked_mm_input:
        raise UnsupportedEngine(
            "this model, or --disable-chunked-mm-input, wants every image computed in one piece; cakekv computes "
            "prompts in pieces that end anywhere"
        )
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        raise UnsupportedEngine("chunked prefill is off: cakekv computes a prompt chunk by chunk; switch it on")


def check_device(device: str, log: bool) -> None:
    """Refuse devices that chunks cannot be copied to and from.

    Parameters
    ----------
    device : str
        Type of the KV cache's, as torch names it.
    log : bool
        Whether to say what should be known of a device that is accepted.

    Raises
    ------
    UnsupportedEngine
        It is neither a CPU nor a CUDA GPU.
    """
    if device not in ("cpu", "cuda"):
        raise UnsupportedEngine(f"the KV cache is on {device}: cakekv places chunks on CPUs and CUDA GPUs only")
    if device == "cuda" and log:
        _LOG.warning(
            "cakekv: the KV cache is on a GPU. The code for that is tested with a stand-in for the device, on CPUs; "
            "the project has not run it on a GPU. Compare some answers with those of vLLM alone before you rely on it"
        )


def computes_while_loading(scheduler: Made) -> Made:
    """Mark a scheduler's class, or a function that makes schedulers, as one that `CakeConnector` works with."""
    setattr(scheduler, _MARK, True)
    return scheduler


def check_scheduler(vllm_config: VllmConfig) -> None:
    """Refuse schedulers that know nothing of restores.

    Raises
    ------
    UnsupportedEngine
        `--scheduler-cls` is missing or another.
    """
    scheduler = vllm_config.scheduler_config.get_scheduler_cls()
    if not getattr(scheduler, _MARK, False):
        asynchronous = vllm_config.scheduler_config.async_scheduling
        wanted = "CakeAsyncScheduler" if asynchronous else "CakeScheduler"
        raise UnsupportedEngine(
            f"CakeConnector needs a scheduler that computes while it loads, and this is {scheduler.__name__}: add "
            f"--scheduler-cls cakekv.vllm.{wanted}"
        )
