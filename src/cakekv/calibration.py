"""What a model costs on this machine, kept between processes, so that the first restore need not find out again."""

from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from cakekv.errors import CakeError
from cakekv.keys import Identity, canonical
from cakekv.restore.costs import ComputeShape

MAX_BYTES = 1 << 20
"""A calibration file is not read beyond this length."""


def cache_folder() -> Path:
    """Where things are kept that can be made again: $CAKEKV_CACHE, or ~/.cache/cakekv."""
    base = os.environ.get("CAKEKV_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "cakekv"


def calibration_key(identity: Identity, device: str, max_span_tokens: int) -> str:
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
    parts = [identity.weights, identity.architecture, identity.dtype, identity.adapter, device, max_span_tokens]
    return blake3(canonical(parts).encode(), derive_key_context="cakekv calibration").hexdigest(16)


def read_calibration(file: Path, key: str) -> ComputeShape | None:
    """The compute cost stored under `key`; None if there is none, or the file is damaged (it will be written anew)."""
    figures = _read(file).get(key)
    if not isinstance(figures, list) or len(figures) != 3:
        return None
    if not all(isinstance(figure, float) and 0 < figure < math.inf for figure in figures):
        return None
    return ComputeShape(*figures)


def write_calibration(file: Path, key: str, shape: ComputeShape) -> None:
    """Store a compute cost under `key`, beside what the file holds already; the file is replaced whole.

    Raises
    ------
    CakeError
        The file cannot be written.
    """
    data = _read(file) | {key: [shape.fixed, shape.linear, shape.quadratic]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                json.dump(data, stream)
            os.replace(scratch, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        raise CakeError(
            f"cannot write the calibration {file}: {error.strerror}; point CAKEKV_CACHE at a writable folder"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            data = json.loads(stream.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
