"""The options of a `Cake`, in one place: every way to make one takes all of them; and what they may be."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict

from cakekv.codec.base import Codec
from cakekv.errors import BadInput
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


def check_options(
    chunk_tokens: int,
    max_span_tokens: int,
    deadline_s: float,
    ttft_target_s: float,
    quality_floor: int,
    codec: Codec,
) -> None:
    """Refuse what is out of range.

    Raises
    ------
    BadInput
        Something is.
    """
    if chunk_tokens < 1 or max_span_tokens < chunk_tokens:
        raise BadInput(
            f"chunk_tokens must be at least 1 and max_span_tokens at least chunk_tokens; "
            f"got {chunk_tokens} and {max_span_tokens}"
        )
    if not deadline_s > 0:
        raise BadInput(f"deadline_s is more than 0 s, not {deadline_s}")
    if not ttft_target_s >= 0:
        raise BadInput(f"ttft_target_s is a number of seconds from 0 on, not {ttft_target_s}")
    if not 1 <= quality_floor <= codec.parts_read:
        raise BadInput(
            f"quality_floor is {quality_floor}, but of codec {codec.name} 1 to {codec.parts_read} parts are read"
        )
