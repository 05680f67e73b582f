"""Mooncake's own client, with deadlines, and with buffers that nobody else uses during a transfer.

That client is a C++ library in this process. It waits up to 30 s for an answer, and cannot be told otherwise, so every
call runs on a thread of its own and is given up at its deadline. Such a call goes on, and even a transfer that failed
may: bytes pass through buffers that are free again only when that is over.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from mooncake.store import MooncakeDistributedStore

from cakekv.errors import NoAnswer, StoreError
from cakekv.store.buffers import Buffer, KeptBuffers

SLICE_BYTES = 1 << 20
"""What is read at a time, at most."""
MOST_CALLS = 16
"""At a time, those that were given up and have not ended included."""
NO_ROOM, BAD_RANGE, NOT_MINE, NOT_READY, NOT_FOUND, LEASE_ENDED, BUSY = -200, -600, -601, -703, -704, -707, -714
TRANSFER_FAILED, NO_CONNECTION, NO_ANSWER = -800, -900, -901
"""Answers of the client that mean something here; 0 is success."""
_ENDED = {NO_ROOM, BAD_RANGE, NOT_MINE, NOT_READY, NOT_FOUND, LEASE_ENDED, BUSY, NO_CONNECTION, NO_ANSWER}
"""No transfer goes on after these."""
_T = TypeVar("_T")


class MooncakeClient:
    """A connection to a Mooncake Store, to which this process lends no memory.

    Parameters
    ----------
    host, port : str, int
        The master.
    metadata, protocol, device : str
        As in `MooncakeStore`.
    timeout_s : float
        Seconds that connecting may take.

    Raises
    ------
    StoreError
        The master cannot be reached, or refuses this client.
    """

    def __init__(self, host: str, port: int, metadata: str, protocol: str, device: str, timeout_s: float) -> None:
        self._where = f"mooncake://{f'[{host}]' if ':' in host else host}:{port}"
        self._slots = threading.BoundedSemaphore(MOST_CALLS)
        self._closed = False
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        self._kept = KeptBuffers()
        self._client = MooncakeDistributedStore()
        # Mooncake's client would try to connect for a minute and a half.
        try:
            with socket.create_connection((host, port), timeout_s) as probe:
                own_address = probe.getsockname()[0]
        except OSError as error:
            raise NoAnswer(
                f"cannot open the store in {self._where}: {error}. See whether Mooncake's master runs there."
            ) from error
        # Neither memory for the pool nor staging memory of its own.
        setup = (own_address, metadata, 0, 0, protocol, device, self._where.removeprefix("mooncake://"))
        if code := self.call("open the store", lambda client: client.setup(*setup), timeout_s):
            raise StoreError(
                f"cannot open the store in {self._where}: Mooncake's client refuses ({code}). See whether metadata=, "
                "protocol= and device= are those of the pool, and the master's log."
            )

    def call(
        self,
        action: str,
        call: Callable[[Any], _T],
        seconds: float,
        late: Callable[[int], None] | None = None,
    ) -> _T:
        """Call Mooncake's client.

        Parameters
        ----------
        action : str
            What it is for, for messages.
        call : callable
            Is given the client, on another thread.
        seconds : float
            When to give it up.
        late : callable or None
            If it is given up, is called with what it answers after that; with 0 if it was never called, -1 if it
            failed.

        Raises
        ------
        StoreError
            It takes too long, or the client raises an error.
        """
        deadline = time.monotonic() + seconds
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(call(self._client))
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._slots.release()

        def ended(future: Future[Any]) -> None:
            if late is not None:
                late(0 if future.cancelled() else -1 if future.exception() else future.result())

        try:
            if not self._closed and not self._slots.acquire(timeout=seconds):
                future.cancel()
                raise TimeoutError
            if self._closed:
                raise StoreError(f"cannot {action} in {self._where}: the store is closed")
            threading.Thread(target=run, name="cakekv-mooncake", daemon=True).start()
            return future.result(deadline - time.monotonic())
        except TimeoutError as error:
            future.add_done_callback(ended)
            raise NoAnswer(
                f"cannot {action} in {self._where}: no answer within {seconds:g} s. See whether the master and its "
                "nodes hang, or give a longer timeout=."
            ) from error
        except RuntimeError as error:
            future.add_done_callback(ended)
            raise StoreError(f"cannot {action} in {self._where}: {error}") from error

    def read(self, name: str, buffer: memoryview, offset: int, seconds: float) -> int:
        """Fill `buffer`, of up to `SLICE_BYTES`, from an object's bytes from `offset` on; 0, or what went wrong."""
        staging = self._borrow(seconds)
        where = [staging.address], [[name]], [[[0]]], [[[offset]]], [[[len(buffer)]]]

        def settle(code: int) -> None:
            if code >= 0 or code in _ENDED:
                self._free.put(staging)
            else:
                self._kept.keep(staging)

        code = self.call(f"read {name}", lambda client: int(client.get_into_ranges(*where)[0][0][0]), seconds, settle)
        if code == len(buffer):
            buffer[:] = staging.view[: len(buffer)]
        settle(code)
        return 0 if code == len(buffer) else min(code, -1)

    def write(self, name: str, data: memoryview, seconds: float) -> int:
        """Store an object, whole or not at all, instead of the one that was there; 0, or what went wrong."""
        self._kept.check()
        staging = Buffer(len(data))
        staging.view[:] = data

        def write(client: Any) -> int:
            for old in self._kept.take_old():
                client.unregister_buffer(old.address)
            if code := int(client.register_buffer(staging.address, len(staging.view))):
                return code
            code = -1
            try:
                code = int(client.upsert_from(name, staging.address, len(staging.view)))
            finally:
                if code == 0 or code in _ENDED:
                    client.unregister_buffer(staging.address)
                else:
                    self._kept.keep(staging)
            return code

        return self.call(f"write {name}", write, seconds)

    def close(self, timeout_s: float) -> None:
        """Disconnect, unless a call hangs: then the connection stays until the process ends."""
        self._closed = True
        deadline = time.monotonic() + timeout_s
        # Mooncake's client crashes if it is used after its end.
        ended = all(self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in range(MOST_CALLS))
        if ended and not self._kept:
            self._client.close()

    def _borrow(self, seconds: float) -> Buffer:
        """A buffer of `SLICE_BYTES`."""
        self._kept.check()
        try:
            return self._free.get_nowait()
        except Empty:
            staging = Buffer(SLICE_BYTES)
            register = staging.address, len(staging.view)
            if code := self.call("use a buffer", lambda client: int(client.register_buffer(*register)), seconds):
                raise StoreError(f"cannot read in {self._where}: Mooncake's client refuses a buffer ({code})") from None
            return staging


_Pool = tuple[str, int, str, str, str]


class SharedClients:
    """The clients of this process: one for each pool, shared by all stores in it, and closed with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[tuple[int, _Pool], tuple[MooncakeClient | None, int]] = {}

    def get(self, pool: _Pool, timeout_s: float) -> MooncakeClient:
        """The client of a pool; `release` it. See `MooncakeClient` for what a pool is, and what goes wrong."""
        place = os.getpid(), pool  # a client does not survive a fork
        with self._lock:
            client, users = self._clients.get(place, (None, 0))
            client = client or MooncakeClient(*pool, timeout_s)
            self._clients[place] = client, users + 1
            return client

    def release(self, pool: _Pool, timeout_s: float) -> None:
        """A store does without the client from now on."""
        place = os.getpid(), pool
        with self._lock:
            client, users = self._clients.pop(place, (None, 0))
            if client is not None and users > 1:
                self._clients[place] = client, users - 1
                return
        if client is not None:
            client.close(timeout_s)


CLIENTS = SharedClients()
