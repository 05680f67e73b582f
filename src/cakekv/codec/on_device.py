"""Decodes where the model's cache is: copies codes to the device and decodes them with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from cakekv.codec.base import Plane
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import ChunkFault, CorruptChunk

_BATCH_BYTES = 1 << 24
"""So much of the cache is decoded at once, or one layer: enough to occupy a GPU, in some six times that of its memory.
"""

Verified = Callable[[int], Sequence[memoryview]]
"""A layer to the parts of its code that were read, verified."""
Finish = Callable[[int, torch.Tensor], torch.Tensor]
"""A layer and its segment, on the device, to what is placed."""


class DeviceDecoder:
    """Decodes the coded chunks of one model on its device. Its methods may be called from several threads.

    Layers are verified one by one on the CPU and sent off while the next is verified; those with planes of one shape
    are decoded together.

    Parameters
    ----------
    coder : ChunkCoder
        What a chunk looks like; its `decodes_on_device` is true.
    device : torch.device
        Where the cache is.
    beside : callable
        Opens a context for work beside the model's, on a stream of its own where there are such; when it ends, also by
        an exception, what was launched in it is done.
    finish : callable or None
        Launches what a layer's segment needs besides, to be placed.
    """

    def __init__(
        self,
        coder: ChunkCoder,
        device: torch.device,
        beside: Callable[[], AbstractContextManager[None]],
        finish: Finish | None = None,
    ) -> None:
        self._coder = coder
        self._device = device
        self._beside = beside
        self._finish = finish
        self._alike = [[replace(plane, layer=0) for plane in coder.planes_of(layer)] for layer in range(coder.layers)]
        """Per layer: what those that are decoded together have in common."""

    def decode(self, layers: Sequence[int], verified: Verified) -> list[torch.Tensor]:
        """Decode layers of a chunk.

        Parameters
        ----------
        layers : sequence of int
            Which ones.
        verified : callable
            Asked for each of them in turn. The buffers that it returns must stay as they are until `decode` returns.

        Returns
        -------
        list of Tensor
            By layer what `finish` made, or the bytes of the layer's segment of the exact form: flat, uint8, on the
            device. Nothing has to be waited for.

        Raises
        ------
        CorruptChunk
            A code has not the length that the codec writes.
        BaseException
            Whatever `verified` raises.
        """
        found = []
        with self._beside():
            for batch in self._batches(layers):
                exact = self._decoded(batch[0], self._sent(batch, verified))
                for layer, segment in zip(batch, exact, strict=True):
                    found.append(segment if self._finish is None else self._finish(layer, segment))
        return found

    def warm_up(self) -> None:
        """Have the device load what it needs, so that the first load does not teach the planner a wrong cost."""
        sizes = [sum(self._coder.sizes_of(0, part)) for part in range(self._coder.codec.parts_read)]
        parts = [memoryview(bytearray(size)) for size in sizes]
        self.decode([0], lambda layer: parts)

    def _batches(self, layers: Sequence[int]) -> Iterator[list[int]]:
        """Neighbours with planes of one shape, not too many."""
        batch: list[int] = []
        for layer in layers:
            most = max(1, _BATCH_BYTES // self._coder.exact.segment_bytes[layer])
            if batch and (len(batch) == most or self._alike[layer] != self._alike[batch[0]]):
                yield batch
                batch = []
            batch.append(layer)
        if batch:
            yield batch

    def _sent(self, batch: list[int], verified: Verified) -> list[torch.Tensor]:
        """Per part, the codes of these layers on the device: (layers, bytes)."""
        sent: list[torch.Tensor] = []
        for row, layer in enumerate(batch):
            for part, code in enumerate(verified(layer)):
                size = sum(self._coder.sizes_of(layer, part))
                if code.nbytes != size:
                    raise CorruptChunk(
                        ChunkFault.UNDECODABLE, f"layer {layer}: it has {code.nbytes} bytes instead of {size}"
                    )
                if row == 0:
                    sent.append(torch.empty((len(batch), size), dtype=torch.uint8, device=self._device))
                sent[part][row].copy_(torch.frombuffer(code, dtype=torch.uint8), non_blocking=True)
        return sent

    def _decoded(self, layer: int, codes: list[torch.Tensor]) -> torch.Tensor:
        """The segments of layers like this one: (layers, bytes)."""
        planes: list[torch.Tensor] = []
        begins = [0] * len(codes)
        for index, plane in enumerate(self._coder.planes_of(layer)):
            sizes = [self._coder.sizes_of(layer, part)[index] for part in range(len(codes))]
            cut = [code[:, begin : begin + size] for code, begin, size in zip(codes, begins, sizes, strict=True)]
            begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
            planes.append(self._elements(plane, self._coder.codec.decode_tensors(plane, cut)))
        return torch.cat(planes, 1).view(torch.uint8)

    @staticmethod
    def _elements(plane: Plane, values: torch.Tensor) -> torch.Tensor:
        """Rounded to the nearest of what the cache holds, ties to even: (layers, elements)."""
        dtype: torch.dtype = getattr(torch, plane.dtype)
        return values.to(dtype).flatten(1)
