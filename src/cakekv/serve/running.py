"""Runs the server until it is told to stop; then it finishes what it has begun."""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import suppress

import uvicorn

from cakekv.errors import BadInput
from cakekv.serve.app import Service, make_app

STOP_S = 30
"""Seconds that answers may take to end, once the server is told to stop."""


class Server(uvicorn.Server):
    """uvicorn's, which tells the service that it stops.

    Parameters
    ----------
    service : Service
        What is served.
    stop_s : int
        As `STOP_S`.
    """

    def __init__(self, service: Service, stop_s: int = STOP_S) -> None:
        config = uvicorn.Config(
            make_app(service), timeout_graceful_shutdown=stop_s, log_level="warning", server_header=False
        )
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: requests that wait are sent away, and those that are being answered go on for a while."""
        self._service.stop()
        await super().shutdown(sockets)


def listening(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; raises `BadInput` if there is none to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BadInput(f"cannot listen at {host}, port {port}: {error}; choose another --host or --port") from error


def serve(service: Service, sock: socket.socket, stop_s: int = STOP_S) -> None:
    """Serve until SIGINT or SIGTERM; everything is saved on return."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it has finished
    with suppress(KeyboardInterrupt):
        Server(service, stop_s).run([sock])
