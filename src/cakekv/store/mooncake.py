"""The Mooncake tier: chunks in a Mooncake Store, the memory pool that many serving clusters already run.

    {prefix}chunk:KEY      a chunk, by its key in hexadecimal: one object
    {prefix}identity:ROOT  a note: whose chunks these are

Objects are ours, in our format, beside those of other users of the pool. How much is kept, and what goes first, is the
master's business. This process lends no memory to the pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any, TypeVar

from cakekv.errors import BadInput, MissingChunk, NoAnswer, NotDeleted, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes
from cakekv.store import mooncake_client as answers
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats, count
from cakekv.store.identities import MAX_NOTE_BYTES, decode_note, encode_note, is_root
from cakekv.store.mooncake_client import CLIENTS, SLICE_BYTES
from cakekv.store.sizes import FoundSizes, known_sizes

DEFAULT_PORT, DEFAULT_ADMIN_PORT = 50051, 9003
TIMEOUT_S = 5.0
_BATCH = 1000
"""Chunks per round trip when all are listed."""
_MAX_LIST_BYTES = 1 << 28
_MAX_CHUNK_BYTES = 1 << 40
_GONE = {answers.BAD_RANGE, answers.NOT_READY, answers.NOT_FOUND, answers.LEASE_ENDED}
_OTHERS = {answers.NOT_MINE, answers.NOT_READY, answers.NOT_FOUND, answers.BUSY}
"""Somebody else writes or removes the object just now."""
_T = TypeVar("_T")
_REASONS = {
    answers.TRANSFER_FAILED: "a transfer failed",
    answers.NO_CONNECTION: "the master cannot be reached",
    answers.NO_ANSWER: "the master does not answer",
}


class MooncakeStore(Store):
    """Chunks in a Mooncake Store.

    Parameters
    ----------
    host, port : str, int
        The master.
    admin_port : int
        The master's port for metrics and administration (`--metrics_port`), which lists what is stored. Loading and
        saving do without it.
    metadata : str
        Where clients find each other, as it was given to the other clients of the pool: "P2PHANDSHAKE", or an address
        such as "http://10.0.0.1:8080/metadata".
    protocol, device : str, str
        How bytes are moved: "tcp" and no device, or "rdma" and devices' names with commas between them.
    prefix : str
        Beginning of all names used in the pool.
    timeout_s : float
        Seconds after which an operation is given up, for each MiB that it moves.

    Raises
    ------
    BadInput
        A parameter is out of range.
    StoreError
        The master cannot be reached, or refuses this client.
    """

    name = "mooncake"
    parallel_reads = 4

    def __init__(
        self,
        host: str,
        port: int = DEFAULT_PORT,
        *,
        admin_port: int = DEFAULT_ADMIN_PORT,
        metadata: str = "P2PHANDSHAKE",
        protocol: str = "tcp",
        device: str = "",
        prefix: str = "cakekv:",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if timeout_s <= 0 or not 0 < admin_port < 1 << 16:
            raise BadInput("a Mooncake store's timeout is more than 0 s, and its admin_port one of 1 to 65535")
        shown_host = f"[{host}]" if ":" in host else host
        self._where = f"mooncake://{shown_host}:{port}"
        self._admin = host, admin_port
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._found = FoundSizes()
        self._pool = host, port, metadata, protocol, device
        self._client = CLIENTS.get(self._pool, timeout_s)
        self._closed = False

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        """See `Store`; two round trips if something is found, since sizes are told of what there is only."""
        if not keys:
            return []
        asked = dict(zip(keys, self._sizes([self._name(key) for key in keys]), strict=True))
        known = {key: size for key, size in asked.items() if not isinstance(size, StoreError)}
        failed = {key: size for key, size in asked.items() if isinstance(size, StoreError)}
        if failed and not known:
            raise next(iter(failed.values()))
        sizes = known_sizes(keys, known, failed)
        self._found.note(keys, sizes)
        return sizes

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [size is not None for size in self.lookup(keys)]

    def open(self, key: ChunkKey) -> ChunkReader:
        size = self._found.take(key) or self._sizes([self._name(key)])[0]
        if isinstance(size, StoreError):
            raise size
        if size is None:
            raise MissingChunk(f"chunk {key.short}… is not in {self._where}")
        return _MooncakeReader(self, key, size)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        """See `Store`; False if somebody else is writing or removing the same chunk."""
        self._found.forget([key])
        return self._put(f"write chunk {key.short}… of {format_bytes(len(data))}", self._name(key), data)

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        if not keys:
            return 0
        self._found.forget(keys)
        names = [self._name(key) for key in keys]
        # By force, because Mooncake leases what was looked up to whoever did, for some seconds.
        codes = self._ask("delete chunks", lambda client: client.batch_remove(names, True))
        left: dict[ChunkKey, StoreError] = {}
        for key, code in zip(keys, codes, strict=True):
            try:
                self._check("delete chunks", 0 if code in _OTHERS else code)
            except StoreError as error:
                left[key] = error
        deleted = sum(int(code == 0) for code in codes)
        if left and len(left) == len(codes):
            raise next(iter(left.values()))
        if left:
            raise NotDeleted.of(deleted, {key: str(error) for key, error in left.items()})
        return deleted

    def __iter__(self) -> Iterator[StoredChunk]:
        """See `Store`; `used_at` is 0, because the master does not tell."""
        names = list(self._listed("chunk"))
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            sizes = self._sizes([f"{self._prefix}chunk:{name}" for name in batch])
            for name, size in zip(batch, sizes, strict=True):
                key = ChunkKey(bytes.fromhex(name))
                if isinstance(size, StoreError):
                    yield StoredChunk(key, 0, 0.0, str(size))
                elif size is not None:
                    yield StoredChunk(key, size, 0.0)

    def stats(self) -> StoreStats:
        return count(self)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        note = encode_note(root, fields).encode()
        self._put("note an identity", f"{self._prefix}identity:{root}", memoryview(note))

    def identities(self) -> dict[str, dict[str, str]]:
        """See `Store`; notes that are damaged are left out."""
        roots = [name for name in self._listed("identity") if is_root(name)]
        found = {}
        for root, size in zip(roots, self._sizes([f"{self._prefix}identity:{root}" for root in roots]), strict=True):
            if not isinstance(size, int) or size > MAX_NOTE_BYTES:
                continue
            note = memoryview(bytearray(size))
            try:
                self._read(f"{self._prefix}identity:{root}", note, 0)
            except MissingChunk:
                continue
            if (fields := decode_note(bytes(note))) is not None:
                found[root] = fields
        return found

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            CLIENTS.release(self._pool, self._timeout_s)

    def read_range(self, key: ChunkKey, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`, of up to 1 MiB, with a chunk's bytes from `offset` on."""
        self._read(self._name(key), buffer, offset)

    def _name(self, key: ChunkKey) -> str:
        return f"{self._prefix}chunk:{key.hex()}"

    def _sizes(self, names: Sequence[str]) -> list[int | StoreError | None]:
        """Size of each object, None where there is none, or why it cannot be told."""

        def ask(client: Any) -> tuple[list[int], dict[str, Any]]:
            exists = client.batch_is_exist(list(names))
            there = [name for name, answer in zip(names, exists, strict=True) if answer == 1]
            return exists, client.batch_get_replica_desc(there) if there else {}

        exists, replicas = self._ask("look for chunks", ask)
        return [self._size(name, answer, replicas.get(name, ())) for name, answer in zip(names, exists, strict=True)]

    def _size(self, name: str, exists: int, replicas: Sequence[Any]) -> int | StoreError | None:
        try:
            self._check("look for chunks", min(exists, 0))
            return self._size_of(name, replicas)
        except StoreError as error:
            return error

    def _size_of(self, name: str, replicas: Sequence[Any]) -> int | None:
        if not replicas:
            return None
        for replica in replicas:
            if replica.is_memory_replica():
                size = replica.get_memory_descriptor().buffer_descriptor.size
                break
        else:
            size = self._ask("look for a chunk", lambda client: client.get_size(name))
        return size if 0 < size <= _MAX_CHUNK_BYTES else None

    def _read(self, name: str, buffer: memoryview, offset: int) -> None:
        self._check_open("read a chunk")
        code = self._client.read(name, buffer, offset, self._timeout_s)
        if code in _GONE:
            raise MissingChunk(f"{_short(name)} was evicted from {self._where}, or replaced, meanwhile")
        self._check(f"read {_short(name)}", code)

    def _put(self, action: str, name: str, data: memoryview) -> bool:
        self._check_open(action)
        code = self._client.write(name, data, self._timeout_s * max(1, -(-len(data) // SLICE_BYTES)))
        if code in _OTHERS:
            return False
        self._check(action, code)
        return True

    def _ask(self, action: str, call: Callable[[Any], _T]) -> _T:
        self._check_open(action)
        return self._client.call(action, call, self._timeout_s)

    def _listed(self, kind: str) -> Iterator[str]:
        """What stands in the master's list behind the prefix and `kind`."""
        pattern = re.compile(re.escape(f"{self._prefix}{kind}:".encode()) + rb"([0-9a-f]{64})")

        def fetch(_: Any) -> bytes:
            connection = HTTPConnection(*self._admin, timeout=self._timeout_s)
            try:
                connection.request("GET", "/get_all_keys")
                response = connection.getresponse()
                if response.status != 200:
                    raise HTTPException(f"status {response.status}")
                return response.read(_MAX_LIST_BYTES + 1)
            finally:
                connection.close()

        try:
            text = self._ask("list the chunks", fetch)
        except (OSError, HTTPException) as error:
            raise StoreError(
                f"cannot list the chunks in {self._where}: its port {self._admin[1]} says {error!r}. If the master's "
                "--metrics_port is another, give it as admin_port=."
            ) from error
        if len(text) > _MAX_LIST_BYTES:
            raise StoreError(f"the list of what {self._where} holds exceeds {format_bytes(_MAX_LIST_BYTES)}")
        for line in text.splitlines():
            if match := pattern.fullmatch(line):
                yield match[1].decode()

    def _check_open(self, action: str) -> None:
        if self._closed:
            raise StoreError(f"cannot {action} in {self._where}: the store is closed")

    def _check(self, action: str, code: int) -> None:
        """Raise what an answer of Mooncake's client means, if it is not 0."""
        if code == 0:
            return
        if code == answers.NO_ROOM:
            raise StoreFull(
                f"cannot {action} in {self._where}: the pool has no room. Let nodes with more memory join it, or lower "
                "the master's --eviction_high_watermark_ratio."
            )
        reason = _REASONS.get(code, "Mooncake's client refuses")
        raise (NoAnswer if code in (answers.NO_CONNECTION, answers.NO_ANSWER) else StoreError)(
            f"cannot {action} in {self._where}: {reason} ({code}). See the logs of the master and the nodes."
        )


class _MooncakeReader(ChunkReader):
    slice_bytes = SLICE_BYTES

    def __init__(self, store: MooncakeStore, key: ChunkKey, size: int) -> None:
        self.size = size
        self._store = store
        self._key = key

    def read_into(self, buffer: memoryview, offset: int) -> int:
        wanted = max(0, min(len(buffer), self.size - offset))
        for start in range(0, wanted, SLICE_BYTES):
            part = buffer[start : min(start + SLICE_BYTES, wanted)]
            self._store.read_range(self._key, part, offset + start)
        return wanted


def _short(name: str) -> str:
    """A name for messages."""
    beginning, separator, key = name.rpartition(":")
    return f"{beginning}{separator}{key[:12]}…"
