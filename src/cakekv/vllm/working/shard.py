"""Shards of a chunk: some KV heads of all layers, each stored under a key of its own.

A worker of a tensor-parallel engine has the heads of one shard, or of several: engines of other sizes share its chunks
if they cut them into the same shards. A shard is stored as vLLM has it, or encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cakekv.chunk import ChunkHeader, Form, seal, segments
from cakekv.codec import codec_named
from cakekv.codec.base import Codec, Segment
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import BadInput, BadOption
from cakekv.keys import ChunkKey, canonical
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from cakekv.load.decoding import decoded_layers
from cakekv.load.reading import Cancellable, Headers, Progress, Wanted, read_chunk
from cakekv.load.staging import StagingPool
from cakekv.store.base import Store
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.messages import LoadOrder
from cakekv.vllm.scheduling.identity import weights_names
from cakekv.vllm.shard_key import shard_key
from cakekv.vllm.working.documents import DocumentReader, Documents, PlaneShapes
from cakekv.vllm.working.paged_cache import PagedCache, open_paged_cache
from cakekv.vllm.working.rotation import rotations

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from cakekv.vllm.working.paged_cache.order import BlockOrder


class Shard:
    """Reads and writes one shard of every chunk.

    Without a codec, what is stored is the blocks' own bytes. With one, it is planes: encoded, or as they are where that
    has to be exact.

    Parameters
    ----------
    tag : str
        Which shard it is: part of its chunks' keys.
    layout : str
        Order of its bytes: part of every key.
    cache : PagedCache
        The shard's part of the blocks.
    coder : ChunkCoder
        What a chunk looks like, and how it is decoded.
    orders : sequence of BlockOrder
        Per layer, if there is a codec.
    documents : callable
        From the shard to its `Documents`.
    """

    def __init__(
        self,
        tag: str,
        layout: str,
        cache: PagedCache,
        coder: ChunkCoder,
        orders: Sequence[BlockOrder],
        documents: Callable[[Shard], Documents],
    ) -> None:
        self.tag = tag
        self.layout = layout
        self.cache = cache
        self.coder = coder
        self.orders = orders
        self.decoder = cache.decoder(coder, orders) if orders else None
        self.staging = StagingPool(cache.allocate, coder.exact.total_bytes)
        """Buffers to place from."""
        self._scratch = StagingPool(_allocate, coder.exact.total_bytes)
        self._headers: Headers = {}
        self.documents = documents(self)

    def forget_headers(self) -> None:
        """No chunk is being loaded in pieces any more."""
        self._headers.clear()

    def read(
        self,
        store: Store,
        order: LoadOrder,
        layers: Sequence[int] | None,
        load: Cancellable,
        progress: Progress,
        stack: ExitStack,
    ) -> Sequence[Segment | None]:
        """Read, verify and decode a chunk, or what is wanted of a document's chunks.

        Parameters
        ----------
        store : Store
            Where from.
        order : LoadOrder
            What.
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
        UnsupportedEngine
            It is a document's, and those cannot be moved here.
        """
        if order.sources:
            return self.documents.reader.read(store, order, load, progress, stack)
        coder, own = self.coder, shard_key(order.key, self.tag)
        is_piece = layers is not None
        wanted = Wanted(own, order.start, range(coder.layers) if layers is None else layers, is_piece=is_piece)
        buffer = stack.enter_context(self.staging.buffer())
        header = read_chunk(store, coder, wanted, buffer, load, progress, self._headers)
        return self._decode(header, wanted, buffer, load, stack)

    def _decode(
        self, header: ChunkHeader, wanted: Wanted, buffer: memoryview, load: Cancellable, stack: ExitStack
    ) -> list[Segment | None]:
        coder, decoder = self.coder, self.decoder if header.shape.form is Form.CODED else None
        # Without orders, what is unpacked is placed from where it is.
        pool = self._scratch if self.orders else self.staging
        parts: list[Segment | None] = [None] * coder.layers
        found = decoded_layers(coder, header, wanted, buffer, load, lambda: stack.enter_context(pool.buffer()), decoder)
        if not self.orders or decoder is not None:
            for layer, segment in found:
                parts[layer] = segment
            return parts
        blocks = segments(coder.exact, stack.enter_context(self.staging.buffer()))
        for layer, planes in found:
            assert isinstance(planes, memoryview), "no decoder was given"
            self.orders[layer].to_blocks(planes, blocks[layer])
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
            if self.orders:
                whole = stack.enter_context(self._scratch.buffer())
                pairs = zip(segments(coder.exact, gathered), segments(coder.exact, whole), strict=True)
                for order, (blocks, planes) in zip(self.orders, pairs, strict=True):
                    order.to_planes(blocks, planes)
                if not exact:
                    chunk = coder.encode(whole, stack.enter_context(self._scratch.buffer()), own, position)
            if chunk is None:
                seal(coder.exact, whole, own, position)
                chunk = whole[: coder.exact.total_bytes]
            return len(chunk) if store.write(own, chunk) else 0


def open_shards(
    options: VllmOptions,
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: Mapping[str, torch.Tensor],
    worker: int,
    workers: int,
) -> list[Shard]:
    """The shards of one worker.

    Parameters
    ----------
    options : VllmOptions
        The plug-in's.
    vllm_config, kv_cache_config
        The engine's.
    kv_caches : mapping of str to tensor
        Per layer, as vLLM hands them to a connector.
    worker, workers : int
        Which of how many workers that hold different heads.

    Raises
    ------
    BadOption
        The codec, or the number of shards, does not go with the model's cache.
    UnsupportedEngine
        A cache is not cut into blocks as expected.
    """
    return _Opener(options, vllm_config, kv_cache_config, kv_caches, worker, workers).open()


class _Opener:
    """Opens a worker's shards."""

    def __init__(
        self,
        options: VllmOptions,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        kv_caches: Mapping[str, torch.Tensor],
        worker: int,
        workers: int,
    ) -> None:
        self._options = options
        self._vllm_config = vllm_config
        self._config = kv_cache_config
        self._spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._kv_caches = kv_caches
        self._codec: Codec = codec_named(options.codec)
        self._shards = options.shards or workers
        self._first = worker * (self._shards // workers)
        self._count = self._shards // workers
        self._heads = heads = self._kv_heads()
        if self._shards % workers or (self._count > 1 and (heads is None or heads % self._count)):
            raise BadOption(
                f"option shards is {options.shards}: it must be a multiple of the {workers} workers with KV heads of "
                f"their own, and divide the model's {(heads or 1) * workers} KV heads evenly"
            )

    def open(self) -> list[Shard]:
        return [self._open(number) for number in range(self._count)]

    def _kv_heads(self) -> int | None:
        """KV heads of this worker, if all layers keep keys and values of several heads; else None."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

        spec = self._spec
        if not isinstance(spec, FullAttentionSpec) or isinstance(spec, MLAAttentionSpec):
            return None
        tensors = self._kv_caches.values()
        alike = all(tensor.dim() == 4 and tensor.shape[1] == spec.num_kv_heads for tensor in tensors)
        return int(spec.num_kv_heads) if alike else None

    def _open(self, number: int) -> Shard:
        heads, caches = self._heads, self._kv_caches
        first, last = 0, heads or 0
        if self._count > 1 and heads is not None:
            first, last = number * heads // self._count, (number + 1) * heads // self._count
            caches = {name: tensor[:, first:last] for name, tensor in caches.items()}
        kernel = self._kernel(next(iter(caches)))
        cache = open_paged_cache(caches, self._config.num_blocks, kernel, self._config.needs_kv_cache_zeroing)
        tag = f"{self._first + number} of {self._shards}"
        tokens, block_tokens = self._options.chunk_tokens, self._spec.block_size
        if not self._codec.encodes:
            layers = [PlaneLayout(1, size // block_tokens, 1) for size in cache.segment_bytes_per_block]
            layout = KVLayout(tuple(LayerLayout((plane,)) for plane in layers))
            coder = ChunkCoder(self._codec, layout, tokens, "bytes")
            return Shard(tag, cache.layout, cache, coder, (), partial(self._documents, first=first, last=last))
        if heads is None:
            raise BadOption(
                f"option codec is {self._options.codec!r}: codecs are for models that keep keys and values of several "
                "heads, alike in all layers; leave it out"
            )
        planes = tuple(PlaneLayout(*plane, self._spec.dtype.itemsize) for plane in self._planes())
        layout = KVLayout(tuple(LayerLayout(planes) for _ in cache.segment_bytes_per_block))
        try:
            turned = partial(rotations, self._vllm_config, len(layout.layers))
            codec = self._codec.for_model(weights_names(self._vllm_config))
            coder = ChunkCoder(codec, layout, tokens, self._dtype, turned)
        except BadInput as error:
            raise BadOption(f"option codec is {self._options.codec!r}: {error}") from error
        coder.warm_up()
        order: dict[str, object] = {"planes": self._planes()}
        if codec.fingerprint != self._codec.fingerprint:  # it has learned something, of which only workers know
            order["learned"] = codec.fingerprint
        documents = partial(self._documents, first=first, last=last)
        return Shard(tag, canonical(order), cache, coder, self._orders(cache, first, last), documents)

    def _documents(self, shard: Shard, first: int, last: int) -> Documents:
        """What reads documents for a shard that has these heads."""
        layers, threads = shard.coder.layers, self._options.load_threads or 8

        def make() -> DocumentReader:
            planes = PlaneShapes(self._planes(), self._dtype, self._spec.dtype.itemsize)
            turned = rotations(self._vllm_config, layers)
            orders = shard.orders or self._orders(shard.cache, first, last)
            return DocumentReader(
                shard.coder, shard.tag, planes, not shard.orders, orders, turned, shard.staging, 2 * threads
            )

        return Documents(self._why_no_documents(layers), make)

    def _why_no_documents(self, layers: int) -> str:
        """Why the keys and values of documents cannot be moved; "" if they can."""
        from vllm.v1.kv_cache_interface import iter_layer_specs

        if self._heads is None:
            return "the model keeps something else than keys and values of several heads, alike in all layers"
        if self._dtype not in ("bfloat16", "float16", "float32"):
            return f"the KV cache is quantised ({self._dtype})"
        specs = list(iter_layer_specs(self._spec))
        if any(getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None) for spec in specs):
            return "some of the model's layers see only a window of the prompt"
        speculation = self._vllm_config.speculative_config
        if speculation is not None and speculation.method not in ("ngram", "ngram_gpu", "suffix"):
            return "the layers of a draft model are in the cache, too"
        if find_spec("numba") is None:
            return "numba is not installed (pip install 'cakekv[codecs]')"
        try:
            rotations(self._vllm_config, layers)
        except Exception as error:  # who never reuses a document should not suffer from an odd model
            return f"how the model turns its keys by their positions is not known: {error}"
        return ""

    @property
    def _dtype(self) -> str:
        return str(self._spec.dtype).removeprefix("torch.")

    def _planes(self) -> list[tuple[int, int]]:
        """(heads, width) of a shard's keys and values."""
        heads = (self._heads or 0) // self._count
        return [(heads, int(self._spec.head_size)), (heads, int(self._spec.head_size_v))]

    def _orders(self, cache: PagedCache, first: int, last: int) -> Sequence[BlockOrder]:
        """Per layer, where elements of the shard are in a block; block 0 is nobody's, so it is written to."""
        known: dict[str, BlockOrder] = {}
        orders: dict[int, BlockOrder] = {}
        for name, segment in cache.segment_of.items():
            kernel = f"{self._kernel(name)} {self._kv_caches[name].stride()}"
            if kernel not in known:
                known[kernel] = self._learn(name, segment, cache, first, last)
            orders[segment] = known[kernel]
        cache.place([0], [memoryview(bytearray(size)) for size in cache.segment_bytes_per_block])
        return [orders[segment] for segment in range(len(orders))]

    def _learn(self, name: str, segment: int, cache: PagedCache, first: int, last: int) -> BlockOrder:
        import torch

        from cakekv.vllm.working.paged_cache.order import learn_order

        layer, tensor = self._vllm_config.compilation_config.static_forward_context[name], self._kv_caches[name]
        tokens, heads = self._spec.block_size, self._heads or 0
        slots = torch.arange(tokens, device=tensor.device)
        buffers = [cache.allocate(size) for size in cache.segment_bytes_per_block]

        def write(planes: Sequence[torch.Tensor]) -> None:
            written = []
            for plane in planes:
                every = torch.zeros(tokens, heads, plane.shape[2], dtype=plane.dtype)
                every[:, first:last] = plane.transpose(0, 1)
                written.append(every.to(tensor.device))
            with torch.inference_mode():
                layer.impl.do_kv_cache_update(layer, *written, layer.kv_cache, slots)

        def read() -> memoryview:
            cache.gather([0], buffers)()
            return buffers[segment]

        shapes = [(heads, tokens, width) for heads, width in self._planes()]
        order = learn_order(shapes, self._spec.dtype, write, read)
        if order is None:
            raise BadOption(
                f"option codec is {self._options.codec!r}, but the attention backend {self._kernel(name)} keeps keys "
                "and values in a form that codecs do not know: leave it out, or choose another --attention-backend"
            )
        return order

    def _kernel(self, layer_name: str) -> str:
        """What decides about the order of the bytes in a block, beside the tensor's shape."""
        layer = self._vllm_config.compilation_config.static_forward_context.get(layer_name)
        backend = getattr(layer, "attn_backend", None)
        name = backend.get_name() if backend is not None else ""
        return f"{name} {getattr(layer, 'isa', '')} {self._config.kv_cache_layout}"


def _allocate(size: int) -> memoryview:
    return memoryview(bytearray(size))
