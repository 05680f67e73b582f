"""A tier that fails on purpose, for tests: wraps a store and mixes in errors, damage, stalls and losses by a seed."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from cakekv.errors import BadInput, MissingChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.quantities import parse_duration
from cakekv.store.base import ChunkReader, Store
from cakekv.store.wrapper import WrappedReader, WrappedStore

Operation = Literal["lookup", "open", "read", "write"]
Fault = Literal["error", "short", "corrupt", "hang", "slow", "vanish"]

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FAULTS: dict[Fault, tuple[Operation, ...]] = {
    "error": OPERATIONS,
    "short": ("read",),
    "corrupt": ("read", "write"),
    "hang": OPERATIONS,
    "slow": OPERATIONS,
    "vanish": ("open", "read"),
}
"""Every fault, and the operations that it can happen to.

error: the operation raises `StoreError`. short: a read returns fewer bytes than there are. corrupt: one bit is flipped.
hang: nothing happens for `hang_s`, then `StoreError`. slow: `slow_s` pass first. vanish: the chunk is deleted under the
reader, which gets `MissingChunk`.
"""


class FaultPlan(NamedTuple):
    """What goes wrong, and how often.

    Attributes
    ----------
    odds : dict
        Per operation and fault, the probability from 0 to 1; what is missing never happens. At most one fault happens
        to an operation, so those of an operation add up to at most 1.
    seed : int
        The same seed gives the same faults: what happens to the n-th operation of a kind on a key depends on nothing
        else, whichever thread comes first.
    slow_s, hang_s : float
        Seconds.
    """

    odds: Mapping[tuple[Operation, Fault], float]
    seed: int = 0
    slow_s: float = 0.05
    hang_s: float = 3600.0


class FaultyStore(WrappedStore):
    """Another store, with faults.

    Parameters
    ----------
    inner : Store
        Where the chunks are.
    plan : FaultPlan
        What goes wrong.

    Attributes
    ----------
    injected : Counter
        How often each fault happened to each operation.

    Raises
    ------
    BadInput
        A fault cannot happen to its operation, or the probabilities of an operation are negative or exceed 1.
    """

    def __init__(self, inner: Store, plan: FaultPlan) -> None:
        for operation in OPERATIONS:
            odds = [share for (op, _), share in plan.odds.items() if op == operation]
            if not all(share >= 0 for share in odds) or sum(odds) > 1 + 1e-9:
                raise BadInput(
                    f"the probabilities of faults of {operation!r} must be from 0 to 1, also together: {odds}"
                )
        for operation, fault in plan.odds:
            if operation not in FAULTS.get(fault, ()):
                raise BadInput(f"there is no fault {fault!r} of {operation!r}; there are {_all_faults()}")
        super().__init__(inner)
        self.injected: Counter[tuple[Operation, Fault]] = Counter()
        self._plan = plan
        self._lock = threading.Lock()
        self._turns: Counter[tuple[Operation, bytes]] = Counter()
        self._closed = threading.Event()

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        self.suffer("lookup", bytes(keys[0]) if keys else b"")
        return self._inner.lookup(keys)

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        self.suffer("lookup", bytes(keys[0]) if keys else b"")
        return self._inner.probe(keys)

    def open(self, key: ChunkKey) -> ChunkReader:
        if self.suffer("open", bytes(key)) == "vanish":
            self.lose(key)
        return _FaultyReader(self, key, self._inner.open(key))

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        if self.suffer("write", bytes(key)) == "corrupt":
            damaged = bytearray(data)
            self.damage(key, memoryview(damaged))
            data = memoryview(damaged)
        return self._inner.write(key, data)

    def close(self) -> None:
        """Release what the store holds, and whoever hangs in it."""
        self._closed.set()
        super().close()

    def suffer(self, operation: Operation, key: bytes) -> Fault | None:
        """Draw this operation's fault, and let it happen as far as it is the same for all operations.

        Returns
        -------
        str or None
            A fault that is left to the caller: "short", "corrupt" or "vanish".

        Raises
        ------
        StoreError
            The fault is an error, or a hang that is over.
        """
        fault = self._draw(operation, key)
        if fault == "error":
            raise StoreError(f"{self.name}: injected error of {operation}")
        if fault == "hang":
            self._closed.wait(self._plan.hang_s)
            raise StoreError(f"{self.name}: injected hang of {operation} is over")
        if fault == "slow":
            self._closed.wait(self._plan.slow_s)
            return None
        return fault

    def _draw(self, operation: Operation, key: bytes) -> Fault | None:
        with self._lock:
            turn = self._turns[operation, key]
            self._turns[operation, key] += 1
            draw = random.Random(f"{self._plan.seed}/{operation}/{key.hex()}/{turn}").random()
            for (where, fault), share in self._plan.odds.items():
                if where == operation:
                    if draw < share:
                        self.injected[operation, fault] += 1
                        return fault
                    draw -= share
        return None

    def damage(self, key: ChunkKey, data: memoryview) -> None:
        """Flip one bit."""
        if len(data):
            bit = random.Random(f"{self._plan.seed}/{key.hex()}").randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8

    def lose(self, key: ChunkKey) -> None:
        """Delete a chunk.

        Raises
        ------
        MissingChunk
            Always.
        """
        self._inner.delete([key])
        raise MissingChunk(f"{self.name}: chunk {key.short} was made to vanish")


class _FaultyReader(WrappedReader):
    def __init__(self, store: FaultyStore, key: ChunkKey, inner: ChunkReader) -> None:
        super().__init__(inner)
        self._store = store
        self._key = key

    def read_into(self, buffer: memoryview, offset: int) -> int:
        fault = self._store.suffer("read", bytes(self._key))
        if fault == "vanish":
            self._store.lose(self._key)
        if fault == "short":
            buffer = buffer[: len(buffer) // 2]
        count = self._inner.read_into(buffer, offset)
        if fault == "corrupt":
            self._store.damage(self._key, buffer[:count])
        return count


def parse_faults(text: str) -> FaultPlan:
    """A plan as it stands in a store's URL.

    Parameters
    ----------
    text : str
        Settings separated by commas: `OPERATION.FAULT:PROBABILITY`, or `FAULT:PROBABILITY` for every operation that the
        fault can happen to, `seed:NUMBER`, `slow_s:DURATION`, `hang_s:DURATION`; for example
        "seed:7,read.error:0.1,corrupt:0.05,slow_s:20ms".

    Raises
    ------
    BadInput
        It is not a plan.
    """
    odds: dict[tuple[Operation, Fault], float] = {}
    settings: dict[str, float] = {}
    for item in text.split(","):
        name, separator, value = item.partition(":")
        try:
            if not separator:
                raise ValueError
            if name == "seed":
                settings[name] = int(value)
            elif name in ("slow_s", "hang_s"):
                settings[name] = parse_duration(value)
            else:
                odds.update(dict.fromkeys(_targets(name), float(value)))
        except ValueError:
            shown = repr(item) if re.fullmatch(r"[a-z._]+:[0-9.]*[a-z]{0,2}", item) else "there is something that"
            raise BadInput(
                f"{shown} is not a fault: write FAULT:PROBABILITY or OPERATION.FAULT:PROBABILITY, with one of "
                f"{_all_faults()}; or seed:NUMBER, slow_s:50ms, hang_s:60s"
            ) from None
    return FaultPlan(odds, int(settings.pop("seed", 0)), **settings)


def _targets(name: str) -> list[tuple[Operation, Fault]]:
    """The operations and the fault that a name such as "read.error" or "error" means; ValueError if none."""
    operation, _, fault = name.rpartition(".")
    found = [(op, kind) for kind, ops in FAULTS.items() for op in ops if kind == fault and operation in ("", op)]
    if not found:
        raise ValueError(name)
    return found


def _all_faults() -> str:
    return ", ".join(f"{operation}.{fault}" for fault, operations in FAULTS.items() for operation in operations)
