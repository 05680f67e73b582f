"""What a model and its tiers cost on this machine, kept between processes so that it is measured once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

from blake3 import blake3

from cakekv.codec.coder import ChunkCoder
from cakekv.errors import CakeError
from cakekv.keys import Identity, canonical
from cakekv.options import CakeOptions
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures
from cakekv.store.base import Store
from cakekv.store.packed import packers

MAX_BYTES = 1 << 20
"""A calibration file is not read beyond this length."""
MAX_ENTRIES = 2000
"""Of more, those that were not renewed for longest are dropped."""
_SECONDS = (1e-15, 1e6)
_BYTES = (1.0, 1e12)
_MAYBE_SECONDS = (0.0, 1e6)


def cache_folder() -> Path:
    """Where things are kept that can be made again: $CAKEKV_CACHE, or ~/.cache/cakekv."""
    base = os.environ.get("CAKEKV_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "cakekv"


def write_cached(file: Path, data: bytes, what: str) -> None:
    """Write a file below `cache_folder`, whole or not at all.

    Raises
    ------
    CakeError
        It cannot be written; the message says `what` was to be.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
            os.replace(scratch, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        raise CakeError(
            f"cannot write the {what} {file}: {error.strerror}; point CAKEKV_CACHE at a writable folder"
        ) from error


def compute_key(identity: Identity, device: str, max_span_tokens: int) -> str:
    """Names what a compute cost depends on: the model and its element type, the device, and the span.

    Parameters
    ----------
    identity : Identity
        Of the model; tenant, chunk size and recipe do not matter.
    device : str
        What computes, with its number of threads.
    max_span_tokens : int
        Longest span of prefill, in tokens.
    """
    parts: list[str | int] = [
        identity.weights,
        identity.architecture,
        identity.dtype,
        identity.adapter,
        device,
        max_span_tokens,
    ]
    return _digest(parts)


def tier_key(url: str, device: str, chunk_bytes: int) -> str:
    """Names what a tier's cost depends on: where it is, where chunks are placed, and how large they are.

    Parameters
    ----------
    url : str
        As `Store.url`.
    device : str
        What computes.
    chunk_bytes : int
        Bytes of a whole chunk.
    """
    return _digest(["tier", url, device, chunk_bytes])


class Calibration:
    """A file of figures by key, each a few numbers. What is damaged in it counts as absent and is written anew.

    Parameters
    ----------
    file : path
        Need not exist.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._file = Path(file)
        self._known = _read(self._file)
        self._new: dict[str, list[float]] = {}

    def compute(self, key: str) -> ComputeShape | None:
        """The compute cost under `key`; None if there is none that can be."""
        figures = self._figures(key, (_SECONDS, _SECONDS, _SECONDS))
        return ComputeShape(*figures) if figures else None

    def tier(self, key: str) -> LoadFigures | None:
        """The tier's cost under `key`; None if there is none that can be."""
        figures = self._figures(key, (_SECONDS, _SECONDS, _BYTES, _MAYBE_SECONDS))
        return LoadFigures(*figures) if figures else None

    def keep(self, key: str, figures: ComputeShape | LoadFigures) -> None:
        """Have these figures written under `key`."""
        self._new[key] = list(astuple(figures))

    def write(self) -> None:
        """Write what is to be kept, beside what the file holds by now; the file is replaced whole.

        Raises
        ------
        CakeError
            The file cannot be written.
        """
        if not self._new:
            return
        others = {key: figures for key, figures in _read(self._file).items() if key not in self._new}
        data = dict([*others.items(), *self._new.items()][-MAX_ENTRIES:])
        write_cached(self._file, json.dumps(data).encode(), "calibration")

    def _figures(self, key: str, ranges: tuple[tuple[float, float], ...]) -> list[float] | None:
        figures = self._known.get(key)
        if not isinstance(figures, list) or len(figures) != len(ranges):
            return None
        for figure, (low, high) in zip(figures, ranges, strict=True):
            if not isinstance(figure, float) or not low <= figure <= high:
                return None
        return figures


class KnownCosts:
    """What a model and its tiers cost, as far as it was ever found out; learns.

    Parameters
    ----------
    options : CakeOptions
        Of the `Cake`. Its `calibration` is a file to begin with; None: nothing is known, and nothing kept.
    identity, device
        As for `compute_key`.
    tiers : sequence of Store
        The tiers; of those without a `url` nothing is kept, since it is not known which they are.
    coder : ChunkCoder
        What chunks look like.

    Attributes
    ----------
    compute : ComputeCost
        What spans cost.
    loads : list of LoadCost
        What each tier costs.
    """

    def __init__(
        self, options: CakeOptions, identity: Identity, device: str, tiers: Sequence[Store], coder: ChunkCoder
    ) -> None:
        self._kept = kept = None if options.calibration is None else Calibration(options.calibration)
        self._compute_key = compute_key(identity, device, options.max_span_tokens)
        chunk_bytes = coder.expected([]).total_bytes
        if coder.encodes:  # a load ends when it is decoded
            device = f"{device}, {identity.recipe}"
        self._tier_keys = [tier_key(tier.url, device, chunk_bytes) if tier.url else None for tier in tiers]
        shape = kept.compute(self._compute_key) if kept else None
        priors = [kept.tier(key) if kept and key else None for key in self._tier_keys]
        for tier, prior in zip(tiers, priors, strict=True):
            if prior is not None:
                for packer in packers(tier):
                    packer.expect_bandwidth(1.0 / prior.byte_s)
        self.compute = ComputeCost() if shape is None else ComputeCost(shape, trusted=True)
        self.loads = [LoadCost(tier.parallel_reads, prior) for tier, prior in zip(tiers, priors, strict=True)]

    def write(self) -> None:
        """Keep what was learned.

        Raises
        ------
        CakeError
            The file cannot be written.
        """
        if self._kept is None:
            return
        if self.compute.known:
            self._kept.keep(self._compute_key, self.compute.shape)
        for key, cost in zip(self._tier_keys, self.loads, strict=True):
            if key is not None and cost.measured:
                self._kept.keep(key, cost.figures)
        self._kept.write()


def _digest(parts: list[str | int]) -> str:
    return blake3(canonical(parts).encode(), derive_key_context="cakekv calibration").hexdigest(16)


def _read(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():  # reading a pipe would not end
            return {}
        with file.open("rb") as stream:
            data = json.loads(stream.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
