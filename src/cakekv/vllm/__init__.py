"""The vLLM plug-in: a KV connector and two schedulers that restore stored prefixes from both ends.

`CakeConnector` goes into `--kv-transfer-config`, `CakeScheduler` (or `CakeAsyncScheduler`, where vLLM schedules
asynchronously) into `--scheduler-cls`. Both are needed: the connector loads and saves, the scheduler computes.

vLLM runs one scheduler and several workers, in processes of their own. `connector.py` hands every call of vLLM's on to
the half that runs in its process: `scheduling/half.py` or `working/half.py`. The halves talk in the messages of
`messages.py` only; each opens the stores (`stores.py`) by the same options (`config.py`), and names what is in them by
the same keys (`shard_key.py`). A request goes through them like this:

In the scheduler (`scheduling/`)
    It comes: `admission.py` reads its own options (`request_options.py`), names its chunks (`identity.py`), and has
    `lookup.py` ask the stores. Once they have answered, vLLM makes room for the stored prefix, and `restoration.py`
    begins: it puts the planner (`cakekv.restore`) into vLLM's terms. Before each step, `half.py` asks the restorations
    what they could compute, and `scheduler.py` has the policy share the step's tokens out, by the costs that
    `step_costs.py` has learned. Once vLLM has put the step together, `load_dispatcher.py` and `save_dispatcher.py` add
    the orders for the workers; `lossy_blocks.py` knows what must not be saved.
In each worker (`working/`)
    The orders come before the forward pass. `load_pool.py` reads chunks, and has them verified and decoded by shards of
    the KV heads (`shard.py`) and placed into vLLM's blocks (`paged_cache/`). After the pass, `save_pool.py` copies what
    is to be saved and writes it behind. A report goes back with the step's output.
In the scheduler again
    `half.py` passes the reports on: to `load_dispatcher.py`, which tells the restorations, and to `parked_blocks.py`,
    which frees blocks once no worker writes into them any more. When the prompt is covered, `hit_statistics.py` counts
    what was loaded among vLLM's own figures, and `outcomes.py` takes the report. From then on the request is like any
    other.
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
