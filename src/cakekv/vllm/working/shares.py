"""What a worker has of every chunk: its KV heads, in as many shares as all engines that use the store agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cakekv.codec import codec_named
from cakekv.codec.base import Codec
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import BadInput, BadOption
from cakekv.keys import canonical
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.working.paged_cache import PagedCache, open_paged_cache
from cakekv.vllm.working.rotation import rotations
from cakekv.vllm.working.share import Share

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from cakekv.vllm.working.paged_cache.order import BlockOrder


class Shares:
    """Opens a worker's shares.

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
    """

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

    def open(self) -> list[Share]:
        """The shares.

        Raises
        ------
        BadOption
            The codec cannot work with the model's cache.
        UnsupportedEngine
            A cache is not cut into blocks as expected.
        """
        return [self._open(number) for number in range(self._count)]

    def layout(self, share: Share) -> str:
        """Order of the bytes in a share: part of every key."""
        return share.cache.layout if self._codec.name == "raw" else canonical({"planes": self._planes()})

    def _kv_heads(self) -> int | None:
        """KV heads of this worker, if all layers keep keys and values of several heads; else None."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

        spec = self._spec
        if not isinstance(spec, FullAttentionSpec) or isinstance(spec, MLAAttentionSpec):
            return None
        tensors = self._kv_caches.values()
        alike = all(tensor.dim() == 4 and tensor.shape[1] == spec.num_kv_heads for tensor in tensors)
        return int(spec.num_kv_heads) if alike else None

    def _open(self, number: int) -> Share:
        heads, caches = self._heads, self._kv_caches
        first, last = 0, heads or 0
        if self._count > 1 and heads is not None:
            first, last = number * heads // self._count, (number + 1) * heads // self._count
            caches = {name: tensor[:, first:last] for name, tensor in caches.items()}
        kernel = self._kernel(next(iter(caches)))
        cache = open_paged_cache(caches, self._config.num_blocks, kernel, self._config.needs_kv_cache_zeroing)
        tag = f"{self._first + number} of {self._shards}"
        tokens, block_tokens = self._options.chunk_tokens, self._spec.block_size
        if self._codec.name == "raw":
            layers = [PlaneLayout(1, size // block_tokens, 1) for size in cache.segment_bytes_per_block]
            layout = KVLayout(tuple(LayerLayout((plane,)) for plane in layers))
            return Share(tag, cache, ChunkCoder(self._codec, layout, tokens, "bytes"), ())
        if heads is None:
            raise BadOption(
                f"option codec is {self._options.codec!r}: codecs are for models that keep keys and values of several "
                "heads, alike in all layers; leave it out"
            )
        dtype = str(self._spec.dtype).removeprefix("torch.")
        planes = tuple(PlaneLayout(*plane, self._spec.dtype.itemsize) for plane in self._planes())
        layout = KVLayout(tuple(LayerLayout(planes) for _ in cache.segment_bytes_per_block))
        try:
            turned = partial(rotations, self._vllm_config, len(layout.layers))
            coder = ChunkCoder(self._codec, layout, tokens, dtype, turned)
        except BadInput as error:
            raise BadOption(f"option codec is {self._options.codec!r}: {error}") from error
        coder.warm_up()
        return Share(tag, cache, coder, self._orders(cache, first, last))

    def _planes(self) -> list[tuple[int, int]]:
        """(heads, width) of a share's keys and values."""
        heads = (self._heads or 0) // self._count
        return [(heads, int(self._spec.head_size)), (heads, int(self._spec.head_size_v))]

    def _orders(self, cache: PagedCache, first: int, last: int) -> Sequence[BlockOrder]:
        """Per layer, where elements of the share are in a block; block 0 is nobody's, so it is written to."""
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
