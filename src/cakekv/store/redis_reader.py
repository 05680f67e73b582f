"""Reads a chunk from Redis in one request, piece by piece into the buffers it is wanted in.

redis-py's own replies are copied several times, at a fifth of the speed; and a request per piece leaves the server idle
in between. A read that is given up costs its connection, and what was on its way.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from redis import exceptions

from cakekv.errors import ChunkFault, CorruptChunk, MissingChunk
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader
from cakekv.store.redis_server import RedisServer

SLICE_BYTES = 1 << 20
_LONGEST_LINE = 1024


class RedisReader(ChunkReader):
    """An open chunk of a `RedisStore`.

    Parameters
    ----------
    server : RedisServer
        What holds it.
    key, name, size : ChunkKey, str, int
        The chunk, what it is called in the server, and its length in bytes.
    marks_use : bool
        Whether reading it counts as using it.
    """

    slice_bytes = SLICE_BYTES

    def __init__(self, server: RedisServer, key: ChunkKey, name: str, size: int, *, marks_use: bool) -> None:
        self.size = size
        self._server = server
        self._key = key
        self._name = name
        self._marks_use = marks_use
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
        server, name = self._server, self._name
        with server.explained(f"read chunk {self._key.short}…", name):
            deadline = time.monotonic() + server.timeout_s
            if self._stream is None or self._stream.position != offset:
                self.close()
                end = self._announced[1]
                whole = end - offset == self.size
                self._stream = _Stream(server, name, offset, end, whole=whole, marks_use=self._marks_use)
            stream, self._stream = self._stream, None
            other = stream.receive(buffer, deadline)
            if not other:
                self._stream = None if stream.has_ended else stream
                return
            if not other.startswith(b"-"):
                raise MissingChunk(f"chunk {self._key.short}… was evicted from {server.where}, or replaced, meanwhile")
            if other.startswith(b"-WRONGTYPE"):
                raise CorruptChunk(ChunkFault.BAD_MAGIC, f"what bears its name in {server.where} is no string")
            if not other.startswith((b"-MOVED ", b"-ASK ")):
                raise exceptions.ResponseError(other[1:].decode(errors="replace").strip())
            data = server.getrange(name, offset, offset + len(buffer) - 1)  # redis-py goes where the chunk has gone
            if len(data) != len(buffer):
                raise MissingChunk(f"chunk {self._key.short}… was replaced in {server.where} meanwhile")
            buffer[:] = data


class _Stream:
    """The answer to one request, on a connection of its own until it ends."""

    def __init__(self, server: RedisServer, name: str, start: int, end: int, *, whole: bool, marks_use: bool) -> None:
        self.position = start
        self._end = end
        self._expected = b"$%d\r\n" % (end - start)
        self._pool = server.pool_of(name)
        self._connection = self._pool.get_connection()
        try:
            if not marks_use:
                self._connection.send_command("CLIENT", "NO-TOUCH", "ON")
                with suppress(exceptions.ResponseError):  # servers before 7.2 count this as a use
                    self._connection.read_response()
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

    def receive(self, buffer: memoryview, deadline: float) -> bytes:
        """Receive the next bytes. If another answer comes, returns how it begins; the stream is over then."""
        try:
            other = self._other_head(self._expected, deadline) if self._expected else b""
            if other:
                self.abandon()
                return other
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
        return b""

    def abandon(self) -> None:
        """End the answer, unless it has ended: by ending its connection."""
        if self._connection is not None:
            self._connection.disconnect()
            self._pool.release(self._connection)
            self._connection = None

    def _other_head(self, expected: bytes, deadline: float) -> bytes:
        """The answer's first line, unless it is `expected`."""
        head, one, all_of_it = b"", memoryview(bytearray(1)), memoryview(bytearray(len(expected)))
        while head != expected:
            # Not a byte more than the line: what follows belongs into the caller's buffer.
            room = all_of_it[len(head) :] if expected.startswith(head) else one
            head += room[: self._receive_some(room, deadline)]
            if not expected.startswith(head) and (head.endswith(b"\n") or len(head) > _LONGEST_LINE):
                return head
        return b""

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
