"""Looks into a Valkey server's database without using the link that the server is behind."""

from __future__ import annotations

import time
from pathlib import Path

from cakekv.errors import CakeError


class ValkeyDatabase:
    """What one database holds.

    Parameters
    ----------
    socket_path : Path
        A socket on which it listens.
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
