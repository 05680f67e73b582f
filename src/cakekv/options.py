"""The options of a `Cake`, in one place: every way to make one takes all of them; and what they may be."""

from __future__ import annotations

import os
from numbers import Real
from typing import TYPE_CHECKING, TypedDict

from cakekv.codec.base import Codec
from cakekv.errors import BadInput
from cakekv.quantities import parse_bytes
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
    save_queue: int | str
    ttft_target_s: float
    quality_floor: int
    calibration: str | os.PathLike[str] | None
    metrics: Metrics | None


LONGEST_DEADLINE_S = 3e7
"""About a year. Who is more patient than that, up to infinity, waits as long: locks have their own limit."""


def patience(deadline_s: float) -> float:
    """A deadline as the system can wait for it, in seconds.

    Raises
    ------
    BadInput
        It is not a number of seconds above 0.
    """
    real = isinstance(deadline_s, Real) and not isinstance(deadline_s, bool)
    if not real or not deadline_s > 0:
        raise BadInput(f"deadline_s is a number of seconds above 0, such as 30, or inf; not {deadline_s!r}")
    return float(min(deadline_s, LONGEST_DEADLINE_S))


def queue_bytes(save_queue: int | str) -> int:
    """The size of a save queue, in bytes.

    Raises
    ------
    BadInput
        It is not a size.
    """
    if isinstance(save_queue, bool) or not isinstance(save_queue, int | str):
        raise BadInput(f'save_queue is a size, such as "1GB" or 1000000000; not {save_queue!r}')
    try:
        return parse_bytes(save_queue)
    except BadInput as error:
        raise BadInput(f"save_queue: {error}") from error


def check_options(
    chunk_tokens: int,
    max_span_tokens: int,
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
    if not ttft_target_s >= 0:
        raise BadInput(f"ttft_target_s is a number of seconds from 0 on, not {ttft_target_s}")
    if not 1 <= quality_floor <= codec.parts_read:
        raise BadInput(
            f"quality_floor is {quality_floor}, but of codec {codec.name} 1 to {codec.parts_read} parts are read"
        )
