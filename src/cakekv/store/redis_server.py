"""A Redis or Valkey server, or a cluster of them, by redis-py: connections, who holds what, errors in our own words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from cakekv.errors import CakeError, NoAnswer, OutOfReach, StoreError, StoreFull

NODES_AT_ONCE = 32
"""Nodes of a cluster that are asked at once."""
_CONNECTIONS = 64
"""To each server, at the most; who finds them all in use waits for one."""
_REFRESH_S = 1.0
"""Seconds between two questions who is who in a cluster, after a node failed."""
_NODE_PAUSE_S = 5.0
"""Seconds for which a cluster's node that did not answer is not asked: it costs its timeout once, and not each time."""


class RedisServer:
    """What a `RedisStore` and its readers talk to.

    Parameters
    ----------
    where : str
        Its URL, for messages: without secrets.
    options : mapping of str to object
        redis-py's: host, port, user, password, TLS.
    database : int or None
        Number of the database; None: it is a node of a cluster.
    timeout_s : float
        Seconds that may pass without progress in connecting, sending or receiving.

    Raises
    ------
    StoreError
        The server cannot be reached, or refuses this client.
    """

    def __init__(self, where: str, options: Mapping[str, Any], *, database: int | None, timeout_s: float) -> None:
        self.where = where
        self.timeout_s = timeout_s
        self.is_cluster = database is None
        self.pool = ThreadPoolExecutor(NODES_AT_ONCE, thread_name_prefix="cakekv-node")
        """Threads that ask nodes of a cluster."""
        self._refreshed_at = time.monotonic()
        self._silent: dict[str, tuple[float, str]] = {}
        """Nodes of a cluster that did not answer: until when they are not asked, and what was wrong."""
        self._lock = threading.Lock()
        common: dict[str, Any] = {
            **options,
            "protocol": 2,  # in which nothing comes unasked
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
        }
        self.client: Any
        with self.explained("open the store"):
            self.client = (
                RedisCluster(**common) if database is None else self._bound(redis.Redis(db=database, **common))
            )
            self.client.ping()

    def close(self) -> None:
        """End all connections and threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()
        if not self.is_cluster:
            self.client.connection_pool.disconnect()

    def getrange(self, name: str, start: int, end: int) -> bytes:
        """What redis-py answers to a GETRANGE; `end` is the last byte's."""
        with self.elsewhere("read a chunk"):
            data: bytes = self.client.getrange(name, start, end)
        return data

    def pool_of(self, name: str) -> Any:
        """The connections to the server that holds `name`."""
        client = self.client_of(self.node_of(name)) if self.is_cluster else self.client
        return client.connection_pool

    def node_of(self, name: str) -> Any:
        """The node of the cluster that holds `name`; raises `NoAnswer` if it does not answer."""
        node = self.client.get_node_from_key(name)
        until, reason = self._silent.get(node.name, (0.0, ""))
        if time.monotonic() < until:
            raise NoAnswer(reason)
        return node

    def pause(self, node: str, reason: str) -> NoAnswer:
        """A node of the cluster has not answered: it is left alone for a while. Returns why."""
        reason = f"the node {node} does not answer: {reason}"
        self._silent[node] = time.monotonic() + _NODE_PAUSE_S, reason
        self._refresh()
        return NoAnswer(reason)

    def some_nodes_answer(self) -> bool:
        """Whether this is a cluster that is not down as a whole, as far as is known."""
        if not self.is_cluster:
            return False
        silent = {name for name, (until, _) in self._silent.items() if time.monotonic() < until}
        return any(node.name not in silent for node in self.client.get_primaries())

    def _refresh(self) -> None:
        """Ask the cluster behind the scenes who holds what now: a replica may have taken over."""
        with self._lock:
            if time.monotonic() - self._refreshed_at < _REFRESH_S:
                return
            self._refreshed_at = time.monotonic()

        def refresh() -> None:
            with suppress(Exception):  # the next answer that fails asks again
                self.client.nodes_manager.initialize(disconnect_startup_nodes_pools=False)

        with suppress(RuntimeError):  # closed meanwhile
            self.pool.submit(refresh)

    def client_of(self, node: Any) -> Any:
        """The client of a cluster's node."""
        return self._bound(self.client.get_redis_connection(node))

    def _bound(self, client: Any) -> Any:
        """The client, such that who finds all connections in use waits for one, and does not fail."""
        with self._lock:
            old = client.connection_pool
            if not isinstance(old, redis.BlockingConnectionPool):
                make: Any = redis.BlockingConnectionPool
                client.connection_pool = make(
                    _CONNECTIONS, self.timeout_s, old.connection_class, **old.connection_kwargs
                )
        return client

    @contextmanager
    def connection(self, name: str) -> Iterator[Any]:
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
    def explained(self, action: str, name: str | None = None) -> Iterator[None]:
        """Turn an error of redis-py or the system into the store's own; that of a cluster's node is its chunks' only.

        Parameters
        ----------
        action : str
            For the message.
        name : str or None
            What the chunk is called in the server, if it is about a single one.
        """
        try:
            with self._explained(action):
                yield
        except NoAnswer as error:
            if name is None or not self.is_cluster:
                raise
            with suppress(exceptions.RedisClusterException, StoreError):
                self.pause(self.node_of(name).name, str(error))
            raise OutOfReach(str(error)) from error

    @contextmanager
    def elsewhere(self, action: str) -> Iterator[None]:
        """As `explained`, for what redis-py sends on to another node than the one that ought to have it."""
        try:
            with self._explained(action):
                yield
        except NoAnswer as error:
            raise OutOfReach(str(error)) from error

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except CakeError:
            raise
        # The last four: redis-py makes no sense of an answer, or has closed a connection in use.
        except (
            exceptions.RedisError,
            exceptions.RedisClusterException,
            OSError,
            ValueError,
            TypeError,
            ArithmeticError,
            RecursionError,
            AttributeError,
        ) as error:
            kind, advice = next((kind, advice) for errors, kind, advice in _ADVICE if isinstance(error, errors))
            if "Cluster mode is not enabled" in str(error):
                advice = "This server is no node of a cluster: leave cluster=true out."
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
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
        NoAnswer,
        "The server does not answer in time: see whether it hangs, or give a longer timeout=.",
    ),
    (
        (exceptions.ConnectionError, exceptions.RedisClusterException, OSError),
        NoAnswer,
        "See whether the server runs there and can be reached, and whether it wants TLS (rediss://).",
    ),
    (Exception, StoreError, "See the server's log."),
]
"""What to say of an error: the first line that fits."""
