"""A share of every chunk: some KV heads of all layers, stored under a key of its own, encoded or as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cakekv.chunk import ChunkHeader, seal, segments
from cakekv.codec.base import Segment
from cakekv.codec.coder import ChunkCoder
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded_layers
from cakekv.load.reading import Cancellable, Headers, Progress, Wanted, read_chunk
from cakekv.load.staging import StagingPool
from cakekv.store.base import Store
from cakekv.vllm.shard_key import shard_key
from cakekv.vllm.working.paged_cache import PagedCache

if TYPE_CHECKING:
    from cakekv.vllm.working.paged_cache.order import BlockOrder


class Share:
    """Reads and writes one share of chunks.

    Without a codec, what is stored is the blocks' own bytes. With one, it is planes: encoded, or as they are where that
    has to be exact.

    Parameters
    ----------
    tag : str
        Which share it is.
    cache : PagedCache
        The share's part of the blocks.
    coder : ChunkCoder
        What a chunk looks like, and how it is decoded.
    orders : sequence of BlockOrder
        Per layer, if there is a codec.
    """

    def __init__(self, tag: str, cache: PagedCache, coder: ChunkCoder, orders: Sequence[BlockOrder]) -> None:
        self.tag = tag
        self.cache = cache
        self.coder = coder
        self._orders = orders
        self._decoder = cache.decoder(coder, orders) if orders else None
        self.staging = StagingPool(cache.allocate, coder.exact.total_bytes)
        """Buffers to place from."""
        self._scratch = StagingPool(_allocate, coder.exact.total_bytes)
        self._headers: Headers = {}

    def forget_headers(self) -> None:
        """No chunk is being loaded in pieces any more."""
        self._headers.clear()

    def read(
        self,
        tier: Store,
        key: ChunkKey,
        position: int,
        layers: Sequence[int] | None,
        load: Cancellable,
        progress: Progress,
        stack: ExitStack,
    ) -> list[Segment | None]:
        """Read, verify and decode a chunk.

        Parameters
        ----------
        tier : Store
            Where from.
        key : ChunkKey
            The chunk's.
        position : int
            Of its first token.
        layers : sequence of int or None
            Of a piece; None: all.
        load, progress
            As for `read_chunk`.
        stack : ExitStack
            Holds the buffers.

        Returns
        -------
        list of Segment or None
            Per layer, as `PagedCache.place` wants it.

        Raises
        ------
        CorruptChunk, MissingChunk, StoreError, Abandoned
        """
        coder, own = self.coder, shard_key(key, self.tag)
        is_piece = layers is not None
        wanted = Wanted(own, position, range(coder.layers) if layers is None else layers, is_piece=is_piece)
        buffer = stack.enter_context(self.staging.buffer())
        header = read_chunk(tier, coder, wanted, buffer, load, progress, self._headers)
        return self._decode(header, wanted, buffer, load, stack)

    def _decode(
        self, header: ChunkHeader, wanted: Wanted, buffer: memoryview, load: Cancellable, stack: ExitStack
    ) -> list[Segment | None]:
        coder, decoder = self.coder, self._decoder if header.shape.packed else None
        decodes = header.shape.packed and decoder is None
        decoded = stack.enter_context(self._scratch.buffer()) if decodes else None
        parts: list[Segment | None] = [None] * coder.layers
        found = decoded_layers(coder, header, wanted, buffer, load, decoded, decoder)
        if not self._orders or decoder is not None:
            for layer, segment in found:
                parts[layer] = segment
            return parts
        blocks = segments(coder.exact, stack.enter_context(self.staging.buffer()))
        for layer, planes in found:
            assert isinstance(planes, memoryview), "no decoder was given"
            self._orders[layer].to_blocks(planes, blocks[layer])
            parts[layer] = blocks[layer]
        return parts

    def gather(self, block_ids: Sequence[int], buffer: memoryview) -> Callable[[], None]:
        """Copy blocks into a buffer for `write`, as `PagedCache.gather` does."""
        return self.cache.gather(block_ids, segments(self.coder.exact, buffer))

    def write(self, store: Store, key: ChunkKey, position: int, gathered: memoryview, exact: bool) -> int:
        """Encode and store what was gathered.

        Parameters
        ----------
        store : Store
            Where to.
        key, position
            The chunk's.
        gathered : memoryview
            Filled by `gather`, as long as the exact form of a chunk.
        exact : bool
            Whether it is to be stored as it is.

        Returns
        -------
        int
            Bytes written; 0 if the store does not want it.

        Raises
        ------
        StoreError, CannotEncode
        """
        coder, own = self.coder, shard_key(key, self.tag)
        with ExitStack() as stack:
            chunk, whole = None, gathered
            if self._orders:
                whole = stack.enter_context(self._scratch.buffer())
                pairs = zip(segments(coder.exact, gathered), segments(coder.exact, whole), strict=True)
                for order, (blocks, planes) in zip(self._orders, pairs, strict=True):
                    order.to_planes(blocks, planes)
                if not exact:
                    chunk = coder.encode(whole, stack.enter_context(self._scratch.buffer()), own, position)
            if chunk is None:
                seal(coder.exact, whole, own, position)
                chunk = whole[: coder.exact.total_bytes]
            return len(chunk) if store.write(own, chunk) else 0


def _allocate(size: int) -> memoryview:
    return memoryview(bytearray(size))
