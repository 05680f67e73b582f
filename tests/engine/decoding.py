"""Engines that decode where the model is, also without a GPU, and engines that never do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cakekv.codec.coder import ChunkCoder
from cakekv.codec.on_device import DeviceDecoder
from cakekv.engine.transfer import CudaTransfer, HostTransfer
from cakekv.engine.transformers import TransformersEngine


class Streamless(CudaTransfer):
    """A GPU's transfer on a CPU: what it launches is done at once."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self.used = 0

    @contextmanager
    def _beside(self) -> Iterator[None]:
        self.used += 1
        yield

    def staging(self, size: int) -> memoryview:
        return HostTransfer().staging(size)


class Decoding(TransformersEngine):
    """Decodes where its caches are.

    Attributes
    ----------
    decoded : list of int
        Layers of chunks, in the order of their decoding.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.device.type == "cpu":
            self._transfer = Streamless()
        self.decoded: list[int] = []

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        decoder = super().decoder(coder)
        if decoder is not None:
            decode = decoder.decode
            decoder.decode = lambda layers, verified: self.decoded.extend(layers) or decode(layers, verified)
        return decoder


class OnCores(TransformersEngine):
    """Decodes on CPU cores, wherever its caches are."""

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        return None
