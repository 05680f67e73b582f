"""The contract of a storage tier: opaque chunks by key. Add a tier by subclassing `Store` in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from cakekv.errors import CannotPin, PinRefused, StoreError
from cakekv.keys import ChunkKey

if TYPE_CHECKING:
    from cakekv.store.pins import Pins
    from cakekv.store.waiting_copies import WaitingCopies


class StoredChunk(NamedTuple):
    """One chunk that a tier holds."""

    key: ChunkKey
    size: int
    """Bytes, header included."""
    used_at: float
    """Seconds since the epoch at which it was last written or read, as far as the tier knows."""
    fault: str = ""
    """Why it is no chunk, or why nothing is known but its name; its size is 0 then."""


class StoreStats(NamedTuple):
    """What a tier holds."""

    chunks: int
    bytes: int
    capacity: int | None
    """Bytes it may hold, or None if it is not bounded."""
    uncounted: tuple[str, ...] = ()
    """What could not be counted, and what is no chunk but bears the name of one; a sentence each."""


class Removal(NamedTuple):
    """That a chunk was removed."""

    at: float
    """Seconds since the epoch; 0 if it is not known."""
    reason: str
    """"capacity": it was evicted to make room; "request": someone deleted it."""


class Evicted(NamedTuple):
    """What a tier has evicted to make room."""

    chunks: int = 0
    bytes: int = 0


class Expected(NamedTuple):
    """A request that waits, and what it will need."""

    name: object
    """Whatever tells it from others."""
    keys: Sequence[ChunkKey]
    fetch: bool = True
    """Whether its chunks are to be copied to the fastest tier before its turn; not if they are being loaded now."""


class Prefetch(NamedTuple):
    """What is copied of a prompt to the fastest tier, behind the scenes."""

    chunks: int = 0
    bytes: int = 0
    already: int = 0
    """Chunks that were there before."""


class ChunkReader(ABC):
    """An open chunk. Its bytes stay readable until `close`, even if the chunk is evicted meanwhile."""

    size: int
    """Bytes of the whole chunk."""
    slice_bytes: int
    """How much to ask for at a time, so that an abandoned read stops soon; at least 4096."""

    def announce(self, start: int, end: int) -> None:  # noqa: B027 - fetching ahead is optional
        """Bytes `start` to `end` of the chunk are read next, in order, so that the tier may fetch ahead."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on.

        Parameters
        ----------
        buffer : memoryview
            Writable, contiguous, format "B".
        offset : int
            Bytes from the start of the chunk.

        Returns
        -------
        int
            Bytes read; fewer than asked for only at the end of the chunk.

        Raises
        ------
        MissingChunk
            The chunk vanished and the tier cannot keep it open.
        StoreError
            The tier failed.
        """

    def close(self) -> None:  # noqa: B027 - closing is optional
        """Release what the reader holds. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Store(ABC):
    """One tier. All methods may be called from several threads."""

    name: str
    """Short name for reports: "memory", "disk", ..."""
    parallel_reads: int = 4
    """How many chunks to read at a time to keep the tier busy."""
    url: str | None = None
    """Where it is, as far as that decides how fast it is, without user and password; set by `open_store`."""

    marks_use: bool = True
    """Whether opening a chunk counts as using it; maintenance, which reads everything, switches it off."""

    @property
    def parts(self) -> Sequence[Store]:
        """The stores it is made of; none if it holds its chunks itself."""
        return []

    counts_cheaply: bool = False
    """Whether `stats` costs so little that it may be asked for every few seconds."""

    @property
    def evicted(self) -> Evicted:
        """What this process has evicted, since it opened the tier; nothing if that is a server's business."""
        return Evicted()

    @property
    def tiers(self) -> Sequence[Store]:
        """What can be loaded from at once: itself, unless it is made of several."""
        return [self]

    @abstractmethod
    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        """Size in bytes of each chunk, or None where it is not stored. One round trip for the whole batch.

        Where that cannot be told of some chunks, they count as not stored, and the answer is one of `Sizes`.

        Raises
        ------
        StoreError
            The tier tells nothing of any chunk.
        """

    def probe(self, keys: Sequence[ChunkKey]) -> list[bool] | None:
        """Which of these chunks are stored; None if to ask that of many takes more than about one round trip.

        At most a few of them are; they are guesses, and not a prompt's chunks, of which a policy learns something.

        Raises
        ------
        StoreError
            The tier tells nothing of any chunk.
        """
        return None

    @abstractmethod
    def open(self, key: ChunkKey) -> ChunkReader:
        """Open a chunk for reading.

        Raises
        ------
        MissingChunk
            It is not stored.
        CorruptChunk
            What bears its name is no chunk.
        StoreError
            The tier failed.
        """

    @abstractmethod
    def write(self, key: ChunkKey, data: memoryview) -> bool:
        """Store a chunk, whole or not at all; what was stored under the key before is replaced.

        Chunks that have to go to make room are evicted before the write begins, so the capacity is never exceeded.

        Parameters
        ----------
        key : ChunkKey
            Its name.
        data : memoryview
            Its bytes; contiguous, format "B".

        Returns
        -------
        bool
            False if the tier chose not to keep the chunk (for instance because it is larger than the capacity).

        Raises
        ------
        StoreFull
            The device behind the tier has no room.
        StoreError
            The tier failed. Nothing is visible under the key that was not there before.
        """

    @abstractmethod
    def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Remove chunks; keys that are not stored are passed over. Returns how many were removed.

        Raises
        ------
        NotDeleted
            Some could not be removed.
        StoreError
            The tier failed.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[StoredChunk]:
        """All chunks, in no particular order.

        Raises
        ------
        StoreError
            The tier, or a part of it, could not be listed; raised after what could be.
        """

    @abstractmethod
    def stats(self) -> StoreStats:
        """How many chunks and bytes the tier holds."""

    @abstractmethod
    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """Note that chunks keyed under the identity `root` (hexadecimal) are written here, to explain misses later."""

    @abstractmethod
    def identities(self) -> dict[str, dict[str, str]]:
        """The identities noted so far: root to its fields."""

    def removals(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Removal] | None:
        """When and why chunks went, as far as that is remembered; None if a server decides, and does not tell."""
        found: dict[ChunkKey, Removal] | None = None
        for part in self.parts:
            remembered = part.removals(keys)
            if remembered is not None:
                found = remembered | (found or {})
        return found

    def pin(self, name: ChunkKey, keys: Sequence[ChunkKey], ttl_s: float, chunk_bytes: int) -> None:
        """Keep chunks from eviction for a while: those that are stored, and those that will be.

        Of several parts, those that can do so; all or none of the chunks in each.

        Parameters
        ----------
        name : ChunkKey
            What to call the pin: the key of the prompt's last chunk. One of that name is prolonged, never shortened.
        keys : sequence of ChunkKey
            The prompt's chunks.
        ttl_s : float
            Seconds from now, by the clock on the wall.
        chunk_bytes : int
            What a chunk counts for that is not stored yet.

        Raises
        ------
        PinRefused
            Pins would take up more of the tier than they may.
        CannotPin
            The tier does not decide what it evicts.
        StoreError
            The tier failed.
        """
        if not self.parts:
            raise CannotPin(f"the {self.name} tier cannot pin chunks: what it evicts is its server's business")
        trouble: list[StoreError] = []
        for part in self.parts:
            try:
                part.pin(name, keys, ttl_s, chunk_bytes)
            except StoreError as error:
                trouble.append(error)
        if len(trouble) == len(self.parts):
            raise next((error for error in trouble if isinstance(error, PinRefused)), trouble[-1])

    def release(self, name: ChunkKey) -> bool:
        """End a pin. Returns whether there was one; raises `StoreError` if a tier failed that may have it."""
        released, trouble = False, None
        for part in self.parts:
            try:
                released |= part.release(name)
            except StoreError as error:
                trouble = error
        if trouble is not None:
            raise trouble
        return released

    def pins(self) -> Pins:
        """The pins in force, of all parts together."""
        from cakekv.store.pins import Pins

        return Pins.together(part.pins() for part in self.parts)

    def expect(self, queue: Sequence[Expected]) -> None:
        """These requests wait, the next one first: spare what they need, and bring it near. Replaces what was said
        before. Does not wait for any tier."""
        for part in self.parts:
            part.expect(queue)

    def prefetch(self, name: ChunkKey, keys: Sequence[ChunkKey]) -> Prefetch:
        """Copy a prompt's chunks from slower tiers to the fastest, behind the scenes; `name` as for `pin`.

        Returns what will be copied, once the tiers have told what they hold. Without several tiers, that is nothing.

        Raises
        ------
        StoreError
            No tier can be asked.
        """
        told = [part.prefetch(name, keys) for part in self.parts]
        return Prefetch(*map(sum, zip(*told, strict=True))) if told else Prefetch()

    @property
    def waiting(self) -> int:
        """Copies that are still to be made from one tier to another."""
        return sum(part.waiting for part in self.parts)

    @property
    def uncopied(self) -> int:
        """Chunks that should have been copied from one tier to another, and could not be."""
        return sum(part.uncopied for part in self.parts)

    def waiting_copies(self) -> WaitingCopies | None:
        """Where to note, durably, which of its chunks wait to be copied to another tier; None if it has no place."""
        return next(filter(None, (part.waiting_copies() for part in self.parts)), None)

    def tidy(self) -> list[str]:
        """Remove what writers that died left behind. Returns what was found, a sentence each."""
        return [sentence for part in self.parts for sentence in part.tidy()]

    def survives_fork(self) -> bool:
        """Asked in a child process right after a fork: whether the store can be used there, as it is.

        Threads are gone then, what they have locked stays locked, and connections are the parent's, too.
        """
        return False

    def close(self) -> None:  # noqa: B027 - closing is optional
        """Release connections and files. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def count(store: Store) -> StoreStats:
    """What a store holds, by listing it; what cannot be listed or is no chunk is named, as long as something is."""
    chunks = size = 0
    uncounted = []
    try:
        for chunk in store:
            chunks += not chunk.fault
            size += chunk.size
            if chunk.fault:
                uncounted.append(f"{chunk.key.hex()}: {chunk.fault}")
    except StoreError as error:
        if not chunks and not uncounted:
            raise
        uncounted.append(str(error))
    return StoreStats(chunks, size, None, tuple(uncounted))


def distinct_names(tiers: Sequence[Store]) -> list[str]:
    """What reports call the tiers: by their names, of which the second of a kind is "disk-2"."""
    names = [tier.name for tier in tiers]
    before = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, before, strict=True)]
