"""Cuts blocks out of the chunks of a document, and turns their keys to where the document stands in a prompt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cakekv.chunk import segments
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import UnsupportedEngine
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded_layers
from cakekv.load.reading import Abandoned, Cancellable, Progress, Wanted, read_chunk
from cakekv.load.staging import StagingPool
from cakekv.rotation import Rotation
from cakekv.store.base import Store
from cakekv.vllm.messages import LoadOrder, Source
from cakekv.vllm.shard_key import shard_key

if TYPE_CHECKING:
    from cakekv.vllm.working.paged_cache.order import BlockOrder

Planes = list[memoryview]
"""Per layer, a chunk's keys and values, each (heads, tokens, width)."""

_LOOK_S = 0.05
"""Whoever waits for another's read looks so often whether it is still wanted."""


class PlaneShapes(NamedTuple):
    """What the planes of a layer look like, in all layers alike."""

    shapes: Sequence[tuple[int, int]]
    """(heads, width) of keys and values."""
    dtype: str
    itemsize: int


class DocumentReader:
    """Reads the chunks of documents that one shard has.

    Unless a document stands at a multiple of a block, blocks lie across two of its chunks, and both that chunk's loads
    need it. So it is kept until the second one has come, or others have taken its place.

    Parameters
    ----------
    coder : ChunkCoder
        What a chunk looks like.
    tag : str
        Which shard it is.
    planes : PlaneShapes
        What it holds.
    stored_as_blocks : bool
        Whether chunks in the exact form hold blocks; else they hold planes.
    orders : sequence of BlockOrder
        Per layer, where in a block an element is.
    rotations : sequence of Rotation
        Per layer, how keys are turned.
    staging : StagingPool
        Buffers to place from.
    kept : int
        How many chunks are kept for a second load at the most.
    """

    def __init__(
        self,
        coder: ChunkCoder,
        tag: str,
        planes: PlaneShapes,
        stored_as_blocks: bool,
        orders: Sequence[BlockOrder],
        rotations: Sequence[Rotation],
        staging: StagingPool,
        kept: int,
    ) -> None:
        self._coder = coder
        self._tag = tag
        self._planes = planes
        self._stored_as_blocks = stored_as_blocks
        self._orders = orders
        self._rotations = rotations
        self._staging = staging
        self._most_kept = kept
        self._changed = threading.Condition()
        self._being_read: set[ChunkKey] = set()
        self._kept: OrderedDict[ChunkKey, Planes] = OrderedDict()

    def forget(self) -> None:
        """Nobody loads any more: keep nothing."""
        with self._changed:
            self._kept.clear()

    def read(
        self, store: Store, order: LoadOrder, load: Cancellable, progress: Progress, stack: ExitStack
    ) -> list[memoryview]:
        """Read, verify, cut and turn what an order wants; as `Shard.read`."""
        chunks = [self._chunk(store, source, load, progress) for source in order.sources]
        tokens = sum(source.end - source.begin for source in order.sources)
        first = order.sources[0]
        distance = order.start - (first.position + first.begin)
        blocks = segments(self._coder.exact, stack.enter_context(self._staging.buffer()))
        parts = []
        for layer, (to_blocks, rotation) in enumerate(zip(self._orders, self._rotations, strict=True)):
            if load.cancelled:
                raise Abandoned
            pieces = [
                (chunk[layer], source.begin, source.end) for chunk, source in zip(chunks, order.sources, strict=True)
            ]
            planes = self._cut(pieces, tokens, rotation, distance)
            part = blocks[layer][: planes.nbytes]
            to_blocks.to_blocks(planes, part)
            parts.append(part)
        return parts

    def warm_up(self) -> None:
        """Have everything compiled before anybody waits for it."""
        tokens = self._orders[0].places[0].shape[1]
        layer = memoryview(bytearray(tokens * self._token_bytes))
        planes = self._cut([(layer, 0, tokens)], tokens, self._rotations[0], 1)
        self._orders[0].to_blocks(planes, layer)
        self._orders[0].to_planes(layer, planes)

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token in one layer."""
        return sum(heads * width for heads, width in self._planes.shapes) * self._planes.itemsize

    def _cut(
        self, pieces: Sequence[tuple[memoryview, int, int]], tokens: int, rotation: Rotation, distance: int
    ) -> memoryview:
        """Planes of so many tokens, put together from those of chunks; the keys turned by a distance."""
        cut = np.empty(tokens * self._token_bytes, np.uint8)
        element = {2: np.uint16, 4: np.uint32}[self._planes.itemsize]
        begins = np.cumsum([0, *(heads * width * self._planes.itemsize for heads, width in self._planes.shapes)])
        for number, ((begin, end), (heads, width)) in enumerate(
            zip(pairwise(begins), self._planes.shapes, strict=True)
        ):
            plane = cut[begin * tokens : end * tokens]
            target, at = plane.view(element).reshape(heads, tokens, width), 0
            for chunk, first, last in pieces:
                count = len(chunk) // self._token_bytes
                source = np.frombuffer(chunk, np.uint8)[begin * count : end * count].view(element)
                target[:, at : at + last - first] = source.reshape(heads, count, width)[:, first:last]
                at += last - first
            if number == 0 and distance and rotation.frequencies:
                self._turn(plane, (heads, tokens, width), rotation, distance)
        return cut.data

    def _turn(
        self, keys: npt.NDArray[np.uint8], shape: tuple[int, int, int], rotation: Rotation, distance: int
    ) -> None:
        from cakekv.codec.elements import from_elements, to_elements
        from cakekv.codec.kernels import turn

        values = from_elements(keys, self._planes.dtype, shape)
        cosine, sine = np.repeat(rotation.turns(distance, 1), shape[1], axis=1)
        turn(values, cosine, sine, rotation.interleaved)
        to_elements(values, self._planes.dtype, keys)

    def _chunk(self, store: Store, source: Source, load: Cancellable, progress: Progress) -> Planes:
        """A chunk's planes: kept from before, or read now, by one thread at a time."""
        with self._changed:
            while source.key in self._being_read:
                if load.cancelled:
                    raise Abandoned
                self._changed.wait(_LOOK_S)
            kept = self._kept.pop(source.key, None)
            if kept is not None:
                progress.coded = True  # whatever it was: reused tokens are not exact
                return kept
            self._being_read.add(source.key)
        planes = None
        try:
            planes = self._read(store, source, load, progress)
            return planes
        finally:
            with self._changed:
                self._being_read.discard(source.key)
                if planes is not None and source.again:
                    self._kept[source.key] = planes
                    while len(self._kept) > self._most_kept:
                        self._kept.popitem(last=False)
                self._changed.notify_all()

    def _read(self, store: Store, source: Source, load: Cancellable, progress: Progress) -> Planes:
        coder = self._coder
        wanted = Wanted(shard_key(source.key, self._tag), source.position, range(coder.layers))
        buffer, room = (memoryview(bytearray(coder.exact.total_bytes)) for _ in range(2))
        header = read_chunk(store, coder, wanted, buffer, load, progress, {})
        found = [segment for _, segment in decoded_layers(coder, header, wanted, buffer, load, lambda: room)]
        planes: Planes = []
        for order, segment in zip(self._orders, found, strict=True):
            assert isinstance(segment, memoryview), "no decoder was given"
            if self._stored_as_blocks:
                blocks, segment = segment, memoryview(bytearray(segment.nbytes))
                order.to_planes(blocks, segment)
            planes.append(segment)
        return planes


class Documents:
    """A shard's `DocumentReader`, made when the first document is to be loaded.

    What it takes is not free: the attention backend has to write a block, and numba compiles, in whose presence vLLM
    starts no other engine in this process.

    Parameters
    ----------
    refused : str
        Why the model's documents cannot be moved; "" if they can.
    make : callable
        Makes the reader, in the thread that launches steps.
    """

    def __init__(self, refused: str, make: Callable[[], DocumentReader]) -> None:
        self.refused = refused
        self._make = make
        self._reader: DocumentReader | None = None

    def prepare(self) -> None:
        """Called by the thread that launches steps, before the first order is read."""
        if self._reader is not None or self.refused:
            return
        try:
            reader = self._make()
            reader.warm_up()
        except Exception as error:  # whatever an attention backend has against being asked
            self.refused = f"blocks cannot be rearranged here: {error}"
            return
        self._reader = reader

    @property
    def reader(self) -> DocumentReader:
        """The reader; `UnsupportedEngine` is raised if there cannot be one."""
        if self._reader is None:
            raise UnsupportedEngine(self.refused)
        return self._reader

    def forget(self) -> None:
        """As `DocumentReader.forget`."""
        if self._reader is not None:
            self._reader.forget()
