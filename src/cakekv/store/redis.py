"""The Redis tier: chunks in a Redis or Valkey server, or a cluster of them, shared by everyone who can reach it.

    {prefix}chunk:KEY   a chunk, by its key in hexadecimal: one string, written with SET, read with GET or GETRANGE
    {prefix}identities  a hash: whose chunks these are

How much is kept, and what goes first, is the server's business (`maxmemory`, `maxmemory-policy`).

redis-py connects, authenticates and pools; the bytes of chunks are received by `redis_reader`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from cakekv.chunk import MAX_CHUNK_BYTES
from cakekv.errors import BadInput, CakeError, MissingChunk, StoreError, StoreFull
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats
from cakekv.store.identities import decode_note, encode_note, is_root
from cakekv.store.redis_reader import SLICE_BYTES, RedisReader
from cakekv.store.sizes import FoundSizes

DEFAULT_PORT = 6379
TIMEOUT_S = 5.0
_BATCH = 1000
"""Chunks per round trip when all are listed."""


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
        self.where = f"redis{'s' if tls else ''}://{host}:{port}" + (f"/{database}" if database else "")
        self._prefix = prefix
        self._ttl_ms = None if ttl_s is None else int(ttl_s * 1000)
        self.timeout_s = timeout_s
        options: dict[str, Any] = {
            "host": host,
            "port": port,
            "username": username,
            "password": password,
            "protocol": 2,  # in which nothing comes unasked
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
        }
        if tls:
            options |= {"ssl": True, "ssl_ca_certs": ca, "ssl_certfile": certificate, "ssl_keyfile": private_key}
        self._is_cluster = cluster
        self._found = FoundSizes()
        self._client: Any
        with self.explained("open the store"):
            self._client = RedisCluster(**options) if cluster else redis.Redis(db=database, **options)
            self._client.ping()

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        with self.explained("look for chunks"):
            sizes = [size or None for size in self._sizes([self.name_of(key) for key in keys], use=self.marks_use)]
        self._found.note(keys, sizes)
        return sizes

    def open(self, key: ChunkKey) -> ChunkReader:
        size = self._found.take(key)
        if size is None:
            with self.explained(f"open chunk {key.short}…"):
                [size] = self._sizes([self.name_of(key)], use=self.marks_use)
        if not size:
            raise MissingChunk(f"chunk {key.short}… is not in {self.where}")
        return RedisReader(self, key, size)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self._found.forget([key])
        expiry = () if self._ttl_ms is None else ("PX", self._ttl_ms)
        with self.explained(f"write chunk {key.short}… of {format_bytes(len(data))}"):
            name = self.name_of(key)
            try:
                with self._connection(name) as connection:
                    packed = connection.pack_command("SET", name, data, *expiry)
                    connection.send_packed_command(list(_sliced(packed)))  # the timeout counts for each slice
                    connection.read_response()
            except (exceptions.AskError, exceptions.MovedError):
                self._client.set(name, data.tobytes(), px=self._ttl_ms)
        return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        if not keys:
            return 0
        self._found.forget(keys)
        with self.explained("delete chunks"), self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.unlink(self.name_of(key))
            return sum(pipeline.execute())

    def __iter__(self) -> Iterator[StoredChunk]:
        """See `Store`; `used_at` is 0 where the server's eviction policy keeps no such time."""
        with self.explained("list the chunks"):
            for keys in self._scan():
                names = [self.name_of(key) for key in keys]
                with self._client.pipeline(transaction=False) as pipeline:
                    for name in names:
                        pipeline.object("IDLETIME", name)
                    idle = pipeline.execute(raise_on_error=False)
                now = time.time()
                for key, idle_s, size in zip(keys, idle, self._sizes(names, use=False), strict=True):
                    if size:
                        yield StoredChunk(key, size, now - idle_s if isinstance(idle_s, int) else 0.0)

    def stats(self) -> StoreStats:
        with self.explained("count the chunks"):
            chunks = size = 0
            for keys in self._scan():
                sizes = [size for size in self._sizes([self.name_of(key) for key in keys], use=False) if size]
                chunks += len(sizes)
                size += sum(sizes)
            return StoreStats(chunks, size, None)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        note = encode_note(root, fields)
        with self.explained("note an identity"):
            self._client.hset(f"{self._prefix}identities", root, note)

    def identities(self) -> dict[str, dict[str, str]]:
        """See `Store`; notes that are damaged are left out."""
        found = {}
        with self.explained("read the identities"):
            for name, note in self._client.hscan_iter(f"{self._prefix}identities"):
                root, fields = name.decode(errors="replace"), decode_note(note)
                if fields is not None and is_root(root):
                    found[root] = fields
        return found

    def close(self) -> None:
        self._client.close()
        if not self._is_cluster:
            self._client.connection_pool.disconnect()

    def getrange(self, name: str, start: int, end: int) -> bytes:
        """What redis-py answers to a GETRANGE; `end` is the last byte's."""
        data: bytes = self._client.getrange(name, start, end)
        return data

    def pool_of(self, name: str) -> Any:
        """The connections to the server that holds `name`."""
        client = self._client
        if self._is_cluster:
            client = client.get_redis_connection(client.get_node_from_key(name))
        return client.connection_pool

    def name_of(self, key: ChunkKey) -> str:
        """What a chunk is called in the server."""
        return f"{self._prefix}chunk:{key.hex()}"

    def _sizes(self, names: Sequence[str], *, use: bool) -> list[int]:
        """Length of each string, 0 where there is none, in one round trip; if not for use, no idle time ends by it.

        Only servers from 7.2 on can be asked so, and no clusters.
        """
        if not names:
            return []
        quietly = not use and not self._is_cluster
        with self._client.pipeline(transaction=False) as pipeline:
            if quietly:
                pipeline.execute_command("CLIENT NO-TOUCH", "ON")
            for name in names:
                pipeline.strlen(name)
            if quietly:
                pipeline.execute_command("CLIENT NO-TOUCH", "OFF")
            answers = list(pipeline.execute(raise_on_error=not quietly))
        sizes = answers[1:-1] if quietly else answers
        for size in sizes:
            if isinstance(size, Exception):
                raise size
            if not isinstance(size, int) or not 0 <= size <= MAX_CHUNK_BYTES:
                raise StoreError(f"{self.where} gives {str(size)[:40]!r} as a chunk's length: is it a Redis server?")
        return sizes

    def _scan(self) -> Iterator[list[ChunkKey]]:
        """The keys of all chunks, each once, in batches."""
        beginning = f"{self._prefix}chunk:"
        pattern = re.compile(re.escape(beginning.encode()) + rb"([0-9a-f]{64})")
        seen: set[ChunkKey] = set()  # SCAN may name a key twice
        batch: list[ChunkKey] = []
        for name in self._client.scan_iter(match=re.sub(r"([*?\[\]\\])", r"\\\1", beginning) + "*", count=_BATCH):
            match = pattern.fullmatch(name)
            key = ChunkKey(bytes.fromhex(match[1].decode())) if match else None
            if key is None or key in seen:
                continue
            seen.add(key)
            batch.append(key)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        yield batch

    @contextmanager
    def _connection(self, name: str) -> Iterator[Any]:
        """A pooled connection to the server that holds `name`; unless the block ends well, it is not used again."""
        pool = self.pool_of(name)
        connection = pool.get_connection()
        try:
            yield connection
        except exceptions.ResponseError:
            raise  # a whole answer: nothing of it is left in the connection
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    @contextmanager
    def explained(self, action: str) -> Iterator[None]:
        """Turn an error of redis-py or the system into the store's own."""
        try:
            yield
        except CakeError:
            raise
        # The last three: redis-py makes no sense of an answer.
        except (
            exceptions.RedisError,
            exceptions.RedisClusterException,
            OSError,
            ValueError,
            TypeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            kind, advice = next((kind, advice) for errors, kind, advice in _ADVICE if isinstance(error, errors))
            if "Cluster mode is not enabled" in str(error):
                advice = "This server is no node of a cluster: leave cluster=true out."
            reason = str(error).rstrip(".") or type(error).__name__
            raise kind(f"cannot {action} in {self.where}: {reason}. {advice}") from None  # which may quote a password


_ADVICE: list[tuple[type[Exception] | tuple[type[Exception], ...], Callable[[str], StoreError], str]] = [
    (
        exceptions.OutOfMemoryError,
        StoreFull,
        "The server's maxmemory is used up and its policy evicts nothing: set maxmemory-policy to allkeys-lru, "
        "or raise maxmemory.",
    ),
    (
        (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError),
        StoreError,
        "Check user name and password (redis://USER:PASSWORD@HOST, in which @ is written as %40, or REDISCLI_AUTH in "
        "the environment), and what this user may do.",
    ),
    (
        (exceptions.MovedError, exceptions.AskError, exceptions.ClusterDownError),
        StoreError,
        "This server is a node of a cluster: write cluster=true.",
    ),
    (
        (exceptions.TimeoutError, TimeoutError),
        StoreError,
        "The server does not answer in time: see whether it hangs, or give a longer timeout=.",
    ),
    (
        (exceptions.ConnectionError, exceptions.RedisClusterException, OSError),
        StoreError,
        "See whether the server runs there and can be reached, and whether it wants TLS (rediss://).",
    ),
    (Exception, StoreError, "See the server's log."),
]
"""What to say of an error: the first line that fits."""


def _sliced(parts: Sequence[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), SLICE_BYTES):
            yield view[start : start + SLICE_BYTES]
