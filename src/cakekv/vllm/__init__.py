"""The vLLM plug-in: a KV connector and two schedulers that restore stored prefixes from both ends.

`CakeConnector` goes into `--kv-transfer-config`, `CakeScheduler` (or `CakeAsyncScheduler`, where vLLM schedules
asynchronously) into `--scheduler-cls`. Both are needed: the connector loads and saves, the scheduler computes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["CakeAsyncScheduler", "CakeConnector", "CakeScheduler"]

if TYPE_CHECKING:
    from cakekv.vllm.connector import CakeConnector
    from cakekv.vllm.scheduling.scheduler import CakeAsyncScheduler, CakeScheduler

_HOMES = {
    "CakeConnector": "connector",
    "CakeScheduler": "scheduling.scheduler",
    "CakeAsyncScheduler": "scheduling.scheduler",
}


def __getattr__(name: str) -> Any:
    """Import vLLM only when one of the classes is asked for.

    Raises
    ------
    UnsupportedEngine
        The vLLM that is installed lacks what they are made of.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm  # noqa: F401 - that there is none, Python says best

    from cakekv.vllm.hooks import unusable

    try:
        found = getattr(import_module(f"cakekv.vllm.{_HOMES[name]}"), name)
    except ImportError as error:
        if not (error.name or "").startswith("vllm."):
            raise
        raise unusable(f"it lacks something ({error})") from error
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise unusable(f"it wants more of a {found.__mro__[1].__name__}: {', '.join(lacking)}")
    return found
