"""The Redis tier: chunks in a Redis or Valkey server, or a cluster, shared by everyone who can reach it.

    {prefix}chunk:KEY   a chunk, by its key in hexadecimal: one string, written with SET, read with GET or GETRANGE
    {prefix}identities  a hash: whose chunks these are
    {prefix}uncopied    a set: which chunks wait to be copied to another tier, keys as bytes

How much is kept, and what goes first, is the server's business (`maxmemory`, `maxmemory-policy`).

`redis_server` connects, by redis-py; the bytes of chunks are received by `redis_reader`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from redis import exceptions

from cakekv.chunk import MAX_CHUNK_BYTES
from cakekv.errors import (
    BadInput,
    ChunkFault,
    CorruptChunk,
    MissingChunk,
    NoAnswer,
    NotDeleted,
    OutOfReach,
    StoreError,
)
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes
from cakekv.store.asking import ask_each
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats, count
from cakekv.store.identities import decode_note, encode_note, is_root
from cakekv.store.redis_reader import SLICE_BYTES, RedisReader
from cakekv.store.redis_server import NODES_AT_ONCE, RedisServer
from cakekv.store.sizes import FoundSizes, known_sizes
from cakekv.store.waiting_copies import WaitingCopies

DEFAULT_PORT = 6379
TIMEOUT_S = 5.0
_BATCH = 1000
"""Chunks per round trip when all are listed."""
_NOT_TEXT = "WRONGTYPE"


class RedisStore(Store):
    """Chunks in a Redis or Valkey server.

    Parameters
    ----------
    host, port : str, int
        The server, or any node of the cluster.
    database : int
        Number of the database; a cluster has only 0.
    username, password : str or None
        Never shown in messages.
    tls : bool
        Whether to connect by TLS. The server's certificate and name are always checked.
    ca : str or None
        File of the certificates to trust instead of the system's.
    certificate, private_key : str or None
        Files that this client shows to a server that asks for them.
    cluster : bool
        Whether the server is a node of a cluster.
    prefix : str
        Beginning of all names used in the server.
    ttl_s : float or None
        Seconds after which a chunk is forgotten; None: never.
    timeout_s : float
        Seconds that may pass without progress in connecting, sending or receiving, and at most between a request for
        up to 1 MiB and the end of its answer.

    Raises
    ------
    BadInput
        A parameter is out of range.
    StoreError
        The server cannot be reached, or refuses this client.
    """

    name = "redis"
    parallel_reads = 4

    def __init__(
        self,
        host: str,
        port: int = DEFAULT_PORT,
        *,
        database: int = 0,
        username: str | None = None,
        password: str | None = None,
        tls: bool = False,
        ca: str | None = None,
        certificate: str | None = None,
        private_key: str | None = None,
        cluster: bool = False,
        prefix: str = "cakekv:",
        ttl_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if timeout_s <= 0 or (ttl_s is not None and ttl_s < 0.001):
            raise BadInput("a Redis store's timeout is more than 0 s, and its ttl, if any, at least 1 ms")
        if cluster and database:
            raise BadInput(f"a Redis cluster has no database but 0, not {database}")
        where = f"redis{'s' if tls else ''}://{host}:{port}" + (f"/{database}" if database else "")
        self._prefix = prefix
        self._ttl_ms = None if ttl_s is None else int(ttl_s * 1000)
        options: dict[str, Any] = {"host": host, "port": port, "username": username, "password": password}
        if tls:
            options |= {"ssl": True, "ssl_ca_certs": ca, "ssl_certfile": certificate, "ssl_keyfile": private_key}
        self._found = FoundSizes()
        self._server = RedisServer(where, options, database=None if cluster else database, timeout_s=timeout_s)

    @property
    def where(self) -> str:
        """The server's URL, without secrets."""
        return self._server.where

    @property
    def timeout_s(self) -> float:
        """Seconds that may pass without progress."""
        return self._server.timeout_s

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        """See `Store`; of a cluster, what is known if a node does not answer in time."""
        known: dict[ChunkKey, int | None] = {}
        failed: dict[ChunkKey, StoreError] = {}
        answered = False
        for key, size in self._sizes(list(dict.fromkeys(keys)), "look for chunks", use=self.marks_use).items():
            if isinstance(size, int):
                known[key] = size or None
            else:
                failed[key] = size if isinstance(size, StoreError) else StoreError(str(size))
            answered |= not isinstance(size, StoreError)
        if failed and not answered and not self._server.some_nodes_answer():
            raise next(iter(failed.values()))
        sizes = known_sizes(keys, known, failed)
        self._found.note(keys, sizes)
        return sizes

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [size is not None for size in self.lookup(keys)]

    def open(self, key: ChunkKey) -> ChunkReader:
        size: int | StoreError | CorruptChunk | None = self._found.take(key)
        if size is None:
            [size] = self._sizes([key], f"open chunk {key.short}…", use=self.marks_use).values()
        if isinstance(size, NoAnswer) and self._server.is_cluster:
            raise OutOfReach(str(size)) from size
        if not isinstance(size, int):
            raise size
        if not size:
            raise MissingChunk(f"chunk {key.short}… is not in {self.where}")
        return RedisReader(self._server, key, self.name_of(key), size, marks_use=self.marks_use)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self._found.forget([key])
        name = self.name_of(key)
        with self._server.explained(f"write chunk {key.short}… of {format_bytes(len(data))}", name):
            try:
                self._set(name, data)
            except AttributeError:  # redis-py, looking who is who in a cluster, closes connections that are in use
                self._set(name, data)
        return True

    def _set(self, name: str, data: memoryview) -> None:
        expiry = () if self._ttl_ms is None else ("PX", self._ttl_ms)
        try:
            with self._server.connection(name) as connection:
                packed = connection.pack_command("SET", name, data, *expiry)
                connection.send_packed_command(list(_sliced(packed)))  # the timeout counts for each slice
                connection.read_response()
        except (exceptions.AskError, exceptions.MovedError):
            with self._server.elsewhere("write a chunk"):
                self._server.client.set(name, data.tobytes(), px=self._ttl_ms)

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        self._found.forget(keys)
        unique = list(dict.fromkeys(keys))
        answers = self._ask(unique, "delete chunks", lambda pipeline, name: pipeline.unlink(name))
        left = {key: str(answer) for key, answer in answers.items() if isinstance(answer, Exception)}
        if left and len(left) == len(unique):
            raise next(answer for answer in answers.values() if isinstance(answer, Exception))
        deleted = sum(answer for answer in answers.values() if isinstance(answer, int))
        if left:
            raise NotDeleted.of(deleted, left)
        return deleted

    def __iter__(self) -> Iterator[StoredChunk]:
        """See `Store`; `used_at` is 0 where the server's eviction policy keeps no such time."""
        trouble: StoreError | None = None
        for keys in self._scan():
            if isinstance(keys, StoreError):
                trouble = keys
                continue
            idle = self._ask(keys, "list the chunks", lambda pipeline, name: pipeline.object("IDLETIME", name))
            sizes = self._sizes(keys, "list the chunks", use=False)
            now = time.time()
            for key in keys:
                size, idle_s = sizes[key], idle[key]
                used_at = now - idle_s if isinstance(idle_s, int) else 0.0
                if not isinstance(size, int):
                    yield StoredChunk(key, 0, used_at, str(size))
                elif size:
                    yield StoredChunk(key, size, used_at)
        if trouble is not None:
            raise trouble

    def stats(self) -> StoreStats:
        return count(self)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        note = encode_note(root, fields)
        with self._server.explained("note an identity"):
            self._server.client.hset(f"{self._prefix}identities", root, note)

    def identities(self) -> dict[str, dict[str, str]]:
        """See `Store`; notes that are damaged are left out."""
        found = {}
        with self._server.explained("read the identities"):
            for name, note in self._server.client.hscan_iter(f"{self._prefix}identities"):
                root, fields = name.decode(errors="replace"), decode_note(note)
                if fields is not None and is_root(root):
                    found[root] = fields
        return found

    def waiting_copies(self) -> WaitingCopies:
        return _WaitingInRedis(self._server, f"{self._prefix}uncopied")

    def close(self) -> None:
        self._server.close()

    def name_of(self, key: ChunkKey) -> str:
        """What a chunk is called in the server."""
        return f"{self._prefix}chunk:{key.hex()}"

    def _sizes(
        self, keys: Sequence[ChunkKey], action: str, *, use: bool
    ) -> dict[ChunkKey, int | StoreError | CorruptChunk]:
        """Length of each string, 0 where there is none, or what is wrong; if not for use, no idle time ends by it.

        Only servers from 7.2 on can be asked so, and no clusters.
        """
        quietly = not use and not self._server.is_cluster
        answers = self._ask(keys, action, lambda pipeline, name: pipeline.strlen(name), quietly=quietly)
        return {key: self._size(answer) for key, answer in answers.items()}

    def _size(self, answer: Any) -> int | StoreError | CorruptChunk:
        if isinstance(answer, StoreError):
            if _NOT_TEXT in str(answer):
                return CorruptChunk(ChunkFault.BAD_MAGIC, f"what bears its name in {self.where} is no string")
            return answer
        if not isinstance(answer, int) or not 0 <= answer <= MAX_CHUNK_BYTES:
            return StoreError(f"{self.where} gives {str(answer)[:40]!r} as a chunk's length: is it a Redis server?")
        return answer

    def _ask(
        self, keys: Sequence[ChunkKey], action: str, command: Callable[[Any, str], Any], *, quietly: bool = False
    ) -> dict[ChunkKey, Any]:
        """What the servers answer to a command for each key, or the `StoreError`; one round trip for each server."""

        def ask(client: Any, keys: Sequence[ChunkKey]) -> list[Any]:
            with self._server.explained(action), client.pipeline(transaction=False) as pipeline:
                if quietly:
                    pipeline.execute_command("CLIENT NO-TOUCH", "ON")
                for key in keys:
                    command(pipeline, self.name_of(key))
                if quietly:
                    pipeline.execute_command("CLIENT NO-TOUCH", "OFF")
                answers = list(pipeline.execute(raise_on_error=False))
                for answer in answers:
                    if not self._server.is_cluster and isinstance(answer, exceptions.AskError | exceptions.MovedError):
                        raise answer  # it is a node of one, and no key would fare better
            answers = answers[1:-1] if quietly else answers
            return [self._settled(key, answer, action, command) for key, answer in zip(keys, answers, strict=True)]

        if not keys:
            return {}
        if not self._server.is_cluster:
            try:
                return dict(zip(keys, ask(self._server.client, keys), strict=True))
            except StoreError as error:
                return dict.fromkeys(keys, error)
        found: dict[ChunkKey, Any] = {}
        shares: dict[str, tuple[Any, list[ChunkKey]]] = {}
        for key in keys:
            try:
                with self._server.explained(action):
                    node = self._server.node_of(self.name_of(key))
                    share = shares.setdefault(node.name, (self._server.client_of(node), []))
            except StoreError as error:
                found[key] = error
            else:
                share[1].append(key)
        silent = dict.fromkeys(shares, "it does not answer in time")
        for name, future in ask_each(self._server.pool, lambda name: ask(*shares[name]), shares, NODES_AT_ONCE):
            try:
                found |= zip(shares[name][1], future.result(), strict=True)
                del silent[name]
            except NoAnswer as error:
                silent[name] = str(error)
            except StoreError as error:
                found |= dict.fromkeys(shares[name][1], error)
                del silent[name]
        for name, reason in silent.items():
            found |= dict.fromkeys(shares[name][1], self._server.pause(name, reason))
        return found

    def _settled(self, key: ChunkKey, answer: Any, action: str, command: Callable[[Any, str], Any]) -> Any:
        """An answer; what a cluster has moved is asked for where it has gone, and an error becomes the store's own."""
        try:
            with self._server.explained(action):
                if isinstance(answer, exceptions.AskError | exceptions.MovedError):
                    with self._server.client.pipeline(transaction=False) as pipeline:
                        command(pipeline, self.name_of(key))
                        [answer] = pipeline.execute(raise_on_error=False)
                if isinstance(answer, Exception):
                    raise answer
        except StoreError as error:
            return error
        return answer

    def _scan(self) -> Iterator[list[ChunkKey] | StoreError]:
        """The keys of all chunks, each once, in batches; of each server that cannot be asked, why."""
        beginning = f"{self._prefix}chunk:"
        pattern = re.compile(re.escape(beginning.encode()) + rb"([0-9a-f]{64})")
        glob = re.sub(r"([*?\[\]\\])", r"\\\1", beginning) + "*"
        seen: set[ChunkKey] = set()  # SCAN may name a key twice
        batch: list[ChunkKey] = []
        nodes = self._server.client.get_primaries() if self._server.is_cluster else []
        for client in [self._server.client_of(node) for node in nodes] or [self._server.client]:
            try:
                with self._server.explained("list the chunks"):
                    for name in client.scan_iter(match=glob, count=_BATCH):
                        match = pattern.fullmatch(name)
                        key = ChunkKey(bytes.fromhex(match[1].decode())) if match else None
                        if key is None or key in seen:
                            continue
                        seen.add(key)
                        batch.append(key)
                        if len(batch) == _BATCH:
                            yield batch
                            batch = []
            except StoreError as error:
                at = client.connection_pool.connection_kwargs
                yield type(error)(f"{at.get('host')}:{at.get('port')} is left out: {error}") if nodes else error
                continue
            yield batch
            batch = []


class _WaitingInRedis(WaitingCopies):
    """Notes that all processes share: one that begins makes the copies of those that are at it, too, if it is first."""

    def __init__(self, server: RedisServer, name: str) -> None:
        self._server = server
        self._name = name

    def add(self, keys: Iterable[ChunkKey]) -> None:
        with self._server.explained("note what is to be copied"):
            self._server.client.sadd(self._name, *map(bytes, keys))

    def remove(self, key: ChunkKey) -> None:
        with self._server.explained("note what was copied"):
            self._server.client.srem(self._name, bytes(key))

    def take_over(self) -> list[ChunkKey]:
        with self._server.explained("look for what is to be copied"):
            members = self._server.client.smembers(self._name)
        return [ChunkKey(member) for member in members if len(member) == ChunkKey.LENGTH]


def _sliced(parts: Sequence[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), SLICE_BYTES):
            yield view[start : start + SLICE_BYTES]
