"""The layered finish in vLLM's terms: which engines and requests it is for, and what a step's orders say about it.

vLLM lets attention layers wait for a connector, but not give a forward pass up. So a step that turns out to lack
something goes on to its end, and its output is thrown away: the request's `num_computed_tokens` is set back, as vLLM
does after failed synchronous loads, and the model runner drops the token that it sampled. What cannot be set back, or
would be seen by others before the step is over, is not computed so.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from cakekv.restore.level_choice import LayerGroups
from cakekv.vllm.messages import WorkerDescription

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

LEAST_PATIENCE_S = 2.0
PATIENCE = 3.0
"""A layered step waits that many times as long as its loads should take, but not less than that many seconds."""


def is_possible(vllm_config: VllmConfig) -> bool:
    """Whether a step of this engine could wait for layers.

    With asynchronous scheduling, the next step is put together before it is known that one was in vain, and others may
    share its blocks by then. The V2 runner counts computed tokens for itself, speculation drafts from tokens that may
    be dropped, and on GPUs none of this was tried.
    """
    from vllm.platforms import current_platform

    scheduler = vllm_config.scheduler_config
    return bool(
        current_platform.is_cpu()
        and not scheduler.async_scheduling
        and not vllm_config.use_v2_model_runner
        and not scheduler.long_prefill_token_threshold
        and vllm_config.speculative_config is None
    )


def may_be_discarded(request: Request) -> bool:
    """Whether a step of this request can be computed again as if it had never been.

    A seeded generator has moved on by then, the model runner has handed its prompt's log-probabilities over, and inputs
    of encoders are freed.
    """
    params = request.sampling_params
    return (
        params is not None and params.seed is None and params.prompt_logprobs is None and not request.has_encoder_inputs
    )


def groups_of(workers: Collection[WorkerDescription]) -> LayerGroups | None:
    """Bytes of each group of layers, of all workers together; None if they cannot be cut alike."""
    sizes = {worker.group_bytes for worker in workers}
    if len(sizes) > 1:
        return None
    total = tuple(size * len(workers) for size in sizes.pop())
    return LayerGroups(total, total) if len(total) > 1 else None
