"""A real network link of a given bandwidth: a second network namespace behind a shaped pair of virtual devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from cakekv.errors import BadInput, CakeError

_LEAST_BURST = 256 * 1024
_BURST_S = 0.005
_QUEUE = "50ms"


class ShapedLink:
    """A link between this network namespace and a new one, as fast as asked for in both directions.

    Linux only, and root only: made with `ip` and `tc` (token bucket filter), removed when the block is left. Nothing in
    between but the kernel: what runs on the far side is a process like any other, started with `far`.

    Parameters
    ----------
    number : int or None
        Chooses names and addresses, 0 to 16383; None: by this process's number.

    Attributes
    ----------
    near_address, far_address : str
        IPv4 addresses of the two ends.

    Raises
    ------
    CakeError
        On entering: not root, no `ip` or `tc`, or they fail; the message says which.

    Examples
    --------
    >>> with ShapedLink() as link:                                               # doctest: +SKIP
    ...     server = subprocess.Popen(link.far(["valkey-server", "--bind", link.far_address]))
    ...     link.set_bandwidth(25e6)
    """

    def __init__(self, number: int | None = None) -> None:
        number = os.getpid() % (1 << 14) if number is None else number
        network = f"10.{200 + (number >> 12)}.{number >> 4 & 0xFF}."
        first = (number & 0xF) * 16
        self.near_address, self.far_address = f"{network}{first + 1}", f"{network}{first + 2}"
        self._namespace = f"cakekv{number}"
        self._near, self._far = f"ckn{number}", f"ckf{number}"

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise CakeError("making a network link needs root: run this with sudo, or as root in a container")
        _run("ip", "netns", "add", self._namespace)
        try:
            _run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._namespace)
            _run("ip", "addr", "add", f"{self.near_address}/28", "dev", self._near)
            _run("ip", "link", "set", self._near, "up")
            _run("ip", "-n", self._namespace, "addr", "add", f"{self.far_address}/28", "dev", self._far)
            _run("ip", "-n", self._namespace, "link", "set", self._far, "up")
            _run("ip", "-n", self._namespace, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def far(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on the far side."""
        return ["ip", "netns", "exec", self._namespace, *command]

    def set_bandwidth(self, bandwidth: float | None) -> None:
        """Change the bandwidth, in bytes per second; None: as fast as the kernel can.

        Raises
        ------
        BadInput
            It is less than 1000 bytes per second.
        CakeError
            `tc` fails.
        """
        for place, device in (([], self._near), (["-n", self._namespace], self._far)):
            if bandwidth is None:
                _run("tc", *place, "qdisc", "replace", "dev", device, "root", "pfifo")
                continue
            if not bandwidth >= 1000:
                raise BadInput(f"a link carries at least 1000 bytes per second, not {bandwidth}")
            burst = int(max(_LEAST_BURST, bandwidth * _BURST_S))
            shape = ["tbf", "rate", f"{8 * bandwidth:.0f}bit", "burst", f"{burst}b", "latency", _QUEUE]
            _run("tc", *place, "qdisc", "replace", "dev", device, "root", *shape)

    def cut(self) -> None:
        """Let nothing through any more, in silence, as when a cable is pulled further on; `mend` undoes it."""
        _run("ip", "-n", self._namespace, "link", "set", self._far, "down")

    def mend(self) -> None:
        """Let everything through again."""
        _run("ip", "-n", self._namespace, "link", "set", self._far, "up")

    def close(self) -> None:
        """Remove the link and the namespace; processes on the far side lose their network."""
        subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True)
        subprocess.run(["ip", "link", "del", self._near], capture_output=True)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise CakeError(f"{command[0]} is not there: install iproute2") from None
    if done.returncode:
        raise CakeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
