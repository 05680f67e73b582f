"""LMCache's server as a process, and the options that make vLLM use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cakekv.bench.servers import free_port
from cakekv.bench.vllm.process import ServerProcess
from cakekv.errors import CakeError

_START_S, _FORGET_S = 120.0, 30.0
_QUIET = {"LMCACHE_TRACK_USAGE": "false"}


def resp_tier(host: str, port: int) -> dict[str, Any]:
    """A Redis or Valkey server."""
    return {"type": "resp", "host": host, "port": port}


def folder_tier(folder: Path) -> dict[str, Any]:
    """A folder, which there has to be."""
    return {"type": "fs", "base_path": str(folder)}


@dataclass
class LMCacheServer(ServerProcess):
    """`lmcache server` with a tier in RAM and one behind it, started by `with` and stopped at its end.

    The way in which LMCache 0.5 works on CPUs: a process beside vLLM.

    Parameters
    ----------
    second_tier : mapping
        What is behind RAM, as in `--l2-adapter`: see `resp_tier` and `folder_tier`.
    chunk_tokens : int
        Tokens per chunk.
    log : Path
        Where its output goes.
    ram_gb : int
        Size of its tier in RAM.

    Raises
    ------
    CakeError
        From `with`: it is not installed, ended, or did not answer in time.
    """

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_s: ClassVar[float] = 15.0

    second_tier: Mapping[str, Any]
    chunk_tokens: int
    log: Path
    ram_gb: int = 2

    def _command(self) -> tuple[list[str], dict[str, str]]:
        self._port, self._http_port = free_port(), free_port()
        command = [_program(), "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--http-port", str(self._http_port), "--chunk-size", str(self.chunk_tokens)]
        command += ["--l1-size-gb", str(self.ram_gb), "--eviction-policy", "LRU", "--disable-observability"]
        command += ["--supported-transfer-mode", "engine_driven", "--l2-adapter", json.dumps(self.second_tier)]
        return command, {**os.environ, **_QUIET}

    @property
    def vllm_arguments(self) -> Sequence[str]:
        """The words to append to `vllm serve`."""
        where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._port}
        transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": where}
        return ["--kv-transfer-config", json.dumps(transfer)]

    def forget(self) -> None:
        """Empty the tier in RAM; what is in the second one stays.

        Raises
        ------
        CakeError
            Something stays in it, for instance because a request is still being served.
        """
        give_up_at = time.monotonic() + _FORGET_S
        while True:
            self._call("/cache/clear", {"tier": "l1", "force": False})
            held = self._call("/status")["storage_manager"]["l1_manager"]["total_object_count"]
            if not held:
                return
            if time.monotonic() > give_up_at:
                raise CakeError(f"LMCache still holds {held} chunks in RAM {_FORGET_S:.0f} s later; see {self.log}")
            time.sleep(0.1)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._http_port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())

    def _wait_until_healthy(self) -> None:
        give_up_at = time.monotonic() + _START_S
        while time.monotonic() < give_up_at and self._process.poll() is None:
            with suppress(urllib.error.URLError, OSError):
                self._call("/healthcheck")
                return
            time.sleep(0.25)
        raise CakeError(f"LMCache's server did not start; see {self.log}")


def _program() -> str:
    beside = Path(sys.executable).with_name("lmcache")
    if beside.exists():
        return str(beside)
    if found := shutil.which("lmcache"):
        return found
    raise CakeError("LMCache is not installed in this environment: make install-peers")
