"""The entry point through which an installed cakekv is found by vLLM (`vllm.general_plugins`)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cakekv.vllm.support import computes_while_loading

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler

CONNECTOR = "CakeConnector"
"""The connector's name in `--kv-transfer-config`."""
MODULE = "cakekv.vllm"
"""Where it is; needed in `--kv-transfer-config` only where plug-ins are not loaded (`VLLM_PLUGINS`)."""

SCHEDULER = "cakekv.vllm.plugin.make_scheduler"
"""What to give to `--scheduler-cls`: whichever of our two schedulers fits."""


@computes_while_loading
def make_scheduler(vllm_config: VllmConfig, **arguments: Any) -> Scheduler:
    """A `CakeAsyncScheduler` if vLLM decided to schedule ahead of the model's outputs, else a `CakeScheduler`.

    vLLM calls this in place of a scheduler's class; which of the two fits depends on the platform and on other options
    and is known only then.
    """
    from cakekv.vllm import CakeAsyncScheduler, CakeScheduler

    kind = CakeAsyncScheduler if vllm_config.scheduler_config.async_scheduling else CakeScheduler
    return kind(vllm_config=vllm_config, **arguments)


def register() -> None:
    """Make the connector known to vLLM by name. vLLM may call this several times in one process.

    Whether vLLM is one that cakekv works with, is asked when the connector is used: vLLM calls this wherever cakekv is
    installed, and should start without it then.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        if CONNECTOR not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    except (ImportError, AttributeError, TypeError) as error:
        logging.getLogger("vllm.cakekv").warning(
            "cakekv: this vLLM does not know CakeConnector by its name: %s; see docs/vllm.md for the versions that do",
            error,
        )
