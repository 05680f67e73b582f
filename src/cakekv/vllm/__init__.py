"""The vLLM plug-in: a KV connector and a scheduler for an unpatched vLLM. Importing this does not import vLLM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cakekv.vllm.connector import CakeConnector
    from cakekv.vllm.scheduler import CakeAsyncScheduler, CakeScheduler

__all__ = ["CakeAsyncScheduler", "CakeConnector", "CakeScheduler"]

_PLACES = {
    "CakeConnector": "cakekv.vllm.connector",
    "CakeScheduler": "cakekv.vllm.scheduler",
    "CakeAsyncScheduler": "cakekv.vllm.scheduler",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
