"""`vllm serve` as a process, with or without the plug-in, and requests over its OpenAI API."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cakekv.bench.servers import free_port
from cakekv.bench.vllm.process import ServerProcess
from cakekv.cli.vllm_args import option_words
from cakekv.errors import CakeError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_START_S = 300.0
_LOG_LINES = 40
_EQUAL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}
"""vLLM for CPUs leaves one core to other threads, and two if there is a KV connector; if there are only two, it then
leaves none. Servers that are compared must compute on the same number."""
NAME = "model"
"""What the model is called in requests."""


def serve_command() -> list[str]:
    """`vllm serve`, up to the model.

    The package vllm-cpu has a command `vllm` that asks for the version of a package called vllm, and stops when there
    is none; there, it is the module behind `vllm serve`.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


@dataclass
class Server(ServerProcess):
    """A server that is started by `with` and stopped at its end.

    Parameters
    ----------
    model : Path
        The model's folder.
    log : Path
        Where its output goes.
    plug_in : mapping or None
        Options of the plug-in (see `VllmOptions`); None: vLLM as it is.
    arguments : sequence of str
        More of `vllm serve`'s command line.
    environment : mapping
        Environment variables besides this process's.

    Raises
    ------
    CakeError
        From `with`: the server ended, or did not answer in time. The end of its output is in the message.
    """

    stop_signal: ClassVar[signal.Signals] = signal.SIGINT
    stop_s: ClassVar[float] = 60.0

    model: Path
    log: Path
    plug_in: Mapping[str, Any] | None = None
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        self.port = free_port()
        command = [*serve_command(), str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", NAME, *self.arguments]
        command += [] if self.plug_in is None else option_words(dict(self.plug_in))
        return command, {"HF_HUB_OFFLINE": "1", **_EQUAL_CORES, **os.environ, **self.environment}

    @property
    def alive(self) -> bool:
        """Whether the server answers and its engine lives."""
        with suppress(urllib.error.URLError, OSError):
            return bool(self._get("/health") is not None)
        return False

    def client(self, timeout_s: float = 600.0) -> OpenAI:
        """The openai package's client of this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=timeout_s, max_retries=0)

    def async_client(self, timeout_s: float = 600.0) -> AsyncOpenAI:
        """The same for asyncio."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=timeout_s, max_retries=0
        )

    def metrics(self) -> dict[str, float]:
        """What `/metrics` shows: samples summed over all labels, and those of an engine or of ours as `name{label}`."""
        from prometheus_client.parser import text_string_to_metric_families

        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                own = [sample.labels[name] for name in ("tier", "reason", "mode", "engine") if name in sample.labels]
                for name in {sample.name, *(f"{sample.name}{{{label}}}" for label in own)}:
                    sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            return str(response.read().decode())

    def _wait_until_healthy(self) -> None:
        give_up_at = time.monotonic() + _START_S
        while not self.alive:
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                state = "did not answer" if self._process.poll() is None else f"ended with {self._process.returncode}"
                raise CakeError(f"vllm serve {state}; its last words, from {self.log}:\n" + "\n".join(lines))
            time.sleep(0.25)
