"""The shaped link: that it is shaped as asked for, and leaves nothing behind. Needs root, ip and tc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cakekv.bench.link import ShapedLink
from cakekv.errors import BadInput, CakeError

SEND = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(bytes(int(connection.recv(100))))
        connection.close()
"""


@pytest.fixture
def link() -> Iterator[Any]:
    try:
        with ShapedLink() as made:
            yield made
    except CakeError as error:
        pytest.skip(str(error))


def receive(address: Any, size: int) -> Any:
    with socket.create_connection((address, 5000), timeout=30) as stream:
        stream.sendall(str(size).encode())
        received = 0
        while data := stream.recv(1 << 20):
            received += len(data)
        return received


def test_a_link(link: Any) -> None:
    with subprocess.Popen(
        link.far([sys.executable, "-c", SEND, link.far_address]), stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout.readline() == "ready\n"
            for bandwidth, shape in ((4e6, "rate 32Mbit"), (8e6, "rate 64Mbit"), (None, "pfifo")):
                link.set_bandwidth(bandwidth)
                for place in ([], ["-n", link._namespace]):
                    shown = subprocess.run(["tc", *place, "qdisc", "show"], capture_output=True, text=True, check=True)
                    assert shape in shown.stdout
                assert receive(link.far_address, 2_000_000) == 2_000_000
        finally:
            server.kill()
    with pytest.raises(BadInput):
        link.set_bandwidth(10)


def test_nothing_is_left_behind(link: Any) -> None:
    number = os.getpid() % (1 << 14)
    link.close()
    for command in (["ip", "netns", "list"], ["ip", "link", "show"]):
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"cakekv{number}" not in names
        assert f"ckn{number}" not in names


def test_it_says_that_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CakeError, match="needs root"), ShapedLink():
        pass
