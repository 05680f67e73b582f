"""Wraps a tier and writes chunks in the form that pays there: packed where reading is slow, else as they are.

Packing saves bytes on the way back and costs decoding there. So it pays where reading what is saved would take longer
than unpacking: (raw - packed) / read bandwidth > raw / unpacking bandwidth. The first is seen in the reads of the tier,
the second is timed once per process, on a chunk that was packed. Reads pass through: readers take either form.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from time import perf_counter

from cakekv.chunk import Form, peek_form
from cakekv.errors import BadInput, CannotUnpack
from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.packed_chunk import pack_chunk, unpack_chunk, unpack_segments, warm_up
from cakekv.store.base import ChunkReader, Store
from cakekv.store.wrapper import WrappedReader, WrappedStore

_LOG = logging.getLogger(__name__)

_USUAL_SHARE = 0.3
"""Of a chunk's bytes, what packing saves of a bfloat16 cache."""
_USUAL_UNPACKING = 2e9
"""Bytes per second that come out where it was not timed yet. It is, at the first chunk that is packed."""
_HOLD = 1.3
"""How much faster or slower than where packing pays a tier must be found for it to change its form."""
_LEAST_BYTES, _LEAST_S = 4 << 20, 0.5
"""So much must have been read, or for so long, before a tier's bandwidth is known."""
_MEMORY_S = 2.0
"""Seconds of reading after which half of what was seen is forgotten."""


class Pack(Enum):
    """Whether a store's chunks are packed."""

    AUTO = "auto"
    """Where it pays."""
    YES = "yes"
    NO = "no"


def parse_pack(text: str) -> Pack:
    """The value of a `pack` option. Raises `BadInput` if it is none."""
    try:
        return Pack(text)
    except ValueError:
        raise BadInput(f"{text!r} is none of {', '.join(pack.value for pack in Pack)}") from None


class Unpacking:
    """How fast this process unpacks chunks, as timed once."""

    def __init__(self) -> None:
        self.bandwidth: float | None = None
        """Bytes per second that come out, of one thread; None: not known yet."""

    def time(self, packed: memoryview) -> None:
        """Unpack a chunk to see how long that takes a loader, unless it is known."""
        if self.bandwidth is not None:
            return
        chunk = unpack_chunk(packed)  # compiles
        began = perf_counter()
        unpack_segments(packed, chunk)
        self.bandwidth = len(chunk) / max(perf_counter() - began, 1e-9)


UNPACKING = Unpacking()


class ReadBandwidth:
    """How fast a tier is read, by all who read at a time together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_ended = 0.0
        self._bytes = 0.0
        self._busy_s = 0.0
        self._expected: float | None = None

    @property
    def value(self) -> float | None:
        """Bytes per second; None while it is not known."""
        if self._bytes < _LEAST_BYTES and self._busy_s < _LEAST_S:
            return self._expected
        return self._bytes / max(self._busy_s, 1e-9)

    @property
    def is_locked(self) -> bool:
        """Whether a thread is in the middle of something."""
        return self._lock.locked()

    def expect(self, bandwidth: float) -> None:
        """It was this much some other time."""
        self._expected = bandwidth

    def read(self, size: int, began: float) -> None:
        """Somebody who began to read then has read so many bytes. Reads beside each other take their time once."""
        with self._lock:
            now = perf_counter()
            self._bytes += size
            self._busy_s += now - max(began, self._last_ended)
            self._last_ended = now
            if self._busy_s > _MEMORY_S:
                self._bytes, self._busy_s = self._bytes / 2, self._busy_s / 2


class PackingChoice:
    """Whether packing pays for a tier, as far as is known by now.

    Parameters
    ----------
    packs : bool
        What is taken for granted until the tier's bandwidth is known.
    bandwidth : float or None
        The tier's, in bytes per second, if that is known for sure.
    unpacking : Unpacking
        How fast chunks are unpacked.
    """

    def __init__(self, packs: bool, bandwidth: float | None = None, unpacking: Unpacking = UNPACKING) -> None:
        self._packs = packs
        self._bandwidth = bandwidth
        self._unpacking = unpacking
        self._share = _USUAL_SHARE
        self.reads = ReadBandwidth()

    @property
    def watches(self) -> bool:
        """Whether it wants to know of reads."""
        return self._bandwidth is None

    def packs(self) -> bool:
        """Whether the next chunk should be packed."""
        bandwidth = self._bandwidth or self.reads.value
        if bandwidth is not None:
            unpacking = self._unpacking.bandwidth
            # Reading the bytes saved takes as long as unpacking, at this bandwidth.
            even = self._share * (unpacking or _USUAL_UNPACKING)
            if bandwidth < even / _HOLD:
                self._packs = True
            elif bandwidth > even * _HOLD:
                self._packs = False
        return self._packs

    def packed(self, raw: int, packed: memoryview | None) -> None:
        """A chunk of `raw` bytes was packed, or did not become smaller (None)."""
        saved = 0.0 if packed is None else 1.0 - len(packed) / raw
        self._share += 0.1 * (saved - self._share)
        if packed is not None:
            self._unpacking.time(packed)


class PackedStore(WrappedStore):
    """Another store, whose chunks are written in the form that it should hold them in.

    What a codec made, and what is no chunk, is written as it is. If a chunk cannot be brought into the other form, it
    is written in the one that it has.

    Parameters
    ----------
    inner : Store
        Where the chunks are.
    pack : Pack
        Whether they are packed.
    choice : PackingChoice or None
        Decides if `pack` is AUTO; None: they are not packed then.
    """

    def __init__(self, inner: Store, pack: Pack, choice: PackingChoice | None = None) -> None:
        super().__init__(inner)
        self.pack = pack
        self._choice = choice if pack is Pack.AUTO else None
        self._unable = False
        """Whether what packs is not installed."""
        self.unformed = 0
        """Chunks that could not be brought into the form wanted."""
        self.on_packed: Callable[[str, int], None] = lambda tier, saved: None
        """Told of the bytes that packing a chunk saved."""

    @property
    def packs(self) -> bool:
        """Whether the next chunk should be packed."""
        if self._choice is not None:
            return not self._unable and self._choice.packs()
        return self.pack is Pack.YES

    def expect_bandwidth(self, bandwidth: float) -> None:
        """How fast the tier was read some other time, in bytes per second."""
        if self._choice is not None:
            self._choice.reads.expect(bandwidth)

    def open(self, key: ChunkKey) -> ChunkReader:
        reader, choice = self._inner.open(key), self._choice
        return reader if choice is None or not choice.watches else _WatchedReader(reader, choice.reads)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        formed = self.formed(data)
        kept = self._inner.write(key, formed)
        if kept and len(formed) < len(data):
            self.on_packed(self.name, len(data) - len(formed))
        return kept

    def formed(self, data: memoryview) -> memoryview:
        """A chunk in the form in which it is written."""
        form = peek_form(data)
        if form not in (Form.EXACT, Form.PACKED) or (form is Form.PACKED) == self.packs:
            return data
        try:
            if form is Form.PACKED:
                return unpack_chunk(data)
            packed = pack_chunk(data)
            if self._choice is not None:
                self._choice.packed(len(data), packed)
            return data if packed is None else packed
        except Exception as error:  # a chunk is never lost for its form
            self._unable = self._unable or isinstance(error, CannotUnpack)
            self.unformed += 1
            if self.unformed == 1:
                level = logging.INFO if self._unable else logging.WARNING
                emit(_LOG, level, "not_packed", tier=self.name, reason=str(error) or type(error).__name__)
            return data

    def survives_fork(self) -> bool:
        locked = self._choice is not None and self._choice.reads.is_locked
        return not locked and self._inner.survives_fork()


class _WatchedReader(WrappedReader):
    """Times reads."""

    def __init__(self, inner: ChunkReader, reads: ReadBandwidth) -> None:
        super().__init__(inner)
        self._reads = reads

    def read_into(self, buffer: memoryview, offset: int) -> int:
        began = perf_counter()
        count = self._inner.read_into(buffer, offset)
        self._reads.read(count, began)
        return count


def packers(store: Store) -> list[PackedStore]:
    """The wrappers of this kind that a store is made of."""
    found = [store] if isinstance(store, PackedStore) else []
    return found + [packer for part in store.parts for packer in packers(part)]


def warm_up_packing(tiers: Iterable[Store]) -> None:
    """Have what packs and unpacks compiled before anybody waits for it, if one of the tiers packs."""
    if any(packer.packs for tier in tiers for packer in packers(tier)):
        with suppress(CannotUnpack):  # chunks are written as they are then
            warm_up()
