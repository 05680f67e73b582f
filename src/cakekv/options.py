"""The options of a `Cake`, in one place: every way to make one takes all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict

from cakekv.codec.base import Codec
from cakekv.restore.priority import Policy

if TYPE_CHECKING:
    from cakekv.metrics import Metrics


class Options(TypedDict, total=False):
    """Keyword arguments of `Cake`, which says what they are."""

    chunk_tokens: int
    max_span_tokens: int
    tenant: str
    codec: str | Codec
    policy: str | Policy
    layered_finish: bool
    deadline_s: float
    ttft_target_s: float
    quality_floor: int
    calibration: str | os.PathLike[str] | None
    metrics: Metrics | None
