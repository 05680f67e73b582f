"""Reading a chunk from Redis: one request for all of it, received piece by piece into the buffers it is wanted in.

redis-py's own replies are copied several times, at a fifth of the speed; and a request per piece leaves the server idle
in between. A read that is given up costs its connection, and what was on its way.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from redis import exceptions

from cakekv.errors import MissingChunk
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader

if TYPE_CHECKING:
    from cakekv.store.redis import RedisStore

SLICE_BYTES = 1 << 20


class RedisReader(ChunkReader):
    """An open chunk of a `RedisStore`."""

    slice_bytes = SLICE_BYTES

    def __init__(self, store: RedisStore, key: ChunkKey, size: int) -> None:
        self.size = size
        self._store = store
        self._key = key
        self._announced = (0, 0)
        self._stream: _Stream | None = None

    def announce(self, start: int, end: int) -> None:
        self._announced = start, min(end, self.size)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        wanted = max(0, min(len(buffer), self.size - offset))
        if not self._announced[0] <= offset < self._announced[1]:
            self.announce(offset, offset + wanted)
        for start in range(0, wanted, SLICE_BYTES):
            self._read(buffer[start : min(start + SLICE_BYTES, wanted)], offset + start)
        return wanted

    def close(self) -> None:
        if self._stream is not None:
            self._stream.abandon()
            self._stream = None

    def _read(self, buffer: memoryview, offset: int) -> None:
        store, name = self._store, self._store.name_of(self._key)
        with store.explained(f"read chunk {self._key.short}…"):
            deadline = time.monotonic() + store.timeout_s
            if self._stream is None or self._stream.position != offset:
                self.close()
                end = self._announced[1]
                self._stream = _Stream(store, name, offset, end, whole=end - offset == self.size)
            stream, self._stream = self._stream, None
            if stream.receive(buffer, deadline):
                self._stream = None if stream.has_ended else stream
                return
            data = store.getrange(name, offset, offset + len(buffer) - 1)  # redis-py knows what the answer means
            if len(data) != len(buffer):
                raise MissingChunk(f"chunk {self._key.short}… was evicted from {store.where}, or replaced, meanwhile")
            buffer[:] = data


class _Stream:
    """The answer to one request, on a connection of its own until it ends."""

    def __init__(self, store: RedisStore, name: str, start: int, end: int, whole: bool) -> None:
        self.position = start
        self._end = end
        self._expected = b"$%d\r\n" % (end - start)
        self._pool = store.pool_of(name)
        self._connection = self._pool.get_connection()
        try:
            if whole:
                self._connection.send_command("GET", name)  # which the server need not copy a part for
            else:
                self._connection.send_command("GETRANGE", name, start, end - 1)
        except BaseException:
            self.abandon()
            raise

    @property
    def has_ended(self) -> bool:
        """Whether all of the answer was received."""
        return self.position == self._end

    def receive(self, buffer: memoryview, deadline: float) -> bool:
        """Receive the next bytes. False if the answer is another than was expected; the stream is over then."""
        try:
            if self._expected and not self._head_is(self._expected, deadline):
                self.abandon()
                return False
            self._expected = b""
            self._fill(buffer, deadline)
            self.position += len(buffer)
            if self.has_ended:
                self._fill(memoryview(bytearray(2)), deadline)
                self._pool.release(self._connection)
                self._connection = None
        except BaseException:
            self.abandon()
            raise
        return True

    def abandon(self) -> None:
        """End the answer, unless it has ended: by ending its connection."""
        if self._connection is not None:
            self._connection.disconnect()
            self._pool.release(self._connection)
            self._connection = None

    def _head_is(self, expected: bytes, deadline: float) -> bool:
        head = memoryview(bytearray(len(expected)))
        done = 0
        while done < len(head):
            done += self._receive_some(head[done:], deadline)
            if not expected.startswith(head[:done]):
                return False
        return True

    def _fill(self, buffer: memoryview, deadline: float) -> None:
        done = 0
        while done < len(buffer):
            done += self._receive_some(buffer[done:], deadline)

    def _receive_some(self, buffer: memoryview, deadline: float) -> int:
        stream: Any = self._connection._sock  # redis-py has no public way to it
        count: int = stream.recv_into(buffer)
        if not count:
            raise exceptions.ConnectionError("the server closed the connection in mid-answer")
        if time.monotonic() > deadline:
            raise exceptions.TimeoutError("the answer is too slow")
        return count
