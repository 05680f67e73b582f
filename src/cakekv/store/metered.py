"""Wraps a tier and counts and times its operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Literal, Protocol

from cakekv.errors import CorruptChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store
from cakekv.store.wrapper import WrappedReader, WrappedStore

Operation = Literal["lookup", "read", "write"]


class Meter(Protocol):
    """Is told of one tier's operations, from several threads."""

    def done(self, operation: Operation, seconds: float, size: int = 0) -> None:
        """An operation succeeded; `size` is the bytes that it moved."""

    def failed(self, operation: Operation, error: Exception) -> None:
        """An operation failed."""

    def closed(self, store: Store) -> None:
        """The tier is about to be closed."""


class MeteredStore(WrappedStore):
    """Another store, measured.

    Parameters
    ----------
    inner : Store
        Where the chunks are.
    meter : Meter
        What is told of look-ups, reads and writes. A read is a chunk from `open` to `close`; its seconds are those
        spent in the store.
    """

    def __init__(self, inner: Store, meter: Meter) -> None:
        super().__init__(inner)
        self._meter = meter

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        began = monotonic()
        with counted_failures(self._meter, "lookup"):
            sizes = self._inner.lookup(keys)
        self._meter.done("lookup", monotonic() - began)
        return sizes

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        began = monotonic()
        with counted_failures(self._meter, "lookup"):
            found = self._inner.probe(keys)
        if found is not None:
            self._meter.done("lookup", monotonic() - began)
        return found

    def open(self, key: ChunkKey) -> ChunkReader:
        began = monotonic()
        with counted_failures(self._meter, "read"):
            reader = self._inner.open(key)
        return _MeteredReader(reader, self._meter, monotonic() - began)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        began = monotonic()
        with counted_failures(self._meter, "write"):
            kept = self._inner.write(key, data)
        self._meter.done("write", monotonic() - began, len(data) if kept else 0)
        return kept

    def close(self) -> None:
        self._meter.closed(self)
        super().close()


class _MeteredReader(WrappedReader):
    def __init__(self, inner: ChunkReader, meter: Meter, seconds: float) -> None:
        super().__init__(inner)
        self._meter = meter
        self._seconds = seconds
        self._bytes = 0
        self._over = False

    def read_into(self, buffer: memoryview, offset: int) -> int:
        began = monotonic()
        try:
            with counted_failures(self._meter, "read"):
                count = self._inner.read_into(buffer, offset)
        except Exception:
            self._over = True
            raise
        self._seconds += monotonic() - began
        self._bytes += count
        return count

    def close(self) -> None:
        super().close()
        if not self._over:
            self._over = True
            self._meter.done("read", self._seconds, self._bytes)


@contextmanager
def counted_failures(meter: Meter, operation: Operation) -> Iterator[None]:
    """Tell the meter of an error that a store may raise."""
    try:
        yield
    except (StoreError, CorruptChunk) as error:
        meter.failed(operation, error)
        raise
