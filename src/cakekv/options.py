"""The options of a `Cake`, in one place: every way to make one takes all of them; and what they may be."""

from __future__ import annotations

import os
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, TypedDict

from cakekv.codec.base import Codec
from cakekv.errors import BadInput
from cakekv.prompt import check_text
from cakekv.quantities import parse_bytes, real, whole
from cakekv.restore.priority import Policy

if TYPE_CHECKING:
    from cakekv.embedded.restorer import OnProgress
    from cakekv.metrics import Metrics
    from cakekv.restore.planner import Mode


class Answering(TypedDict, total=False):
    """Keyword arguments of `Cake.stream`, which says what they are."""

    max_new_tokens: int
    mode: Mode
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    save: bool
    on_progress: OnProgress | None


MOST_TOKENS = 2**31 - 1
"""Of a chunk, or a span."""


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


def check_kinds(**given: object) -> None:
    """Refuse options of `Cake` that are of another kind than it takes. What they hold may be secret, and is not told.

    Raises
    ------
    BadInput
        One is.
    """
    for name, value in given.items():
        kinds, what = _KINDS[name]
        if not isinstance(value, kinds):
            raise BadInput(f"{name} must be {what}, not of type {type(value).__name__}")
        if isinstance(value, str):
            check_text(value, name)


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "tenant": ((str,), "text"),
    "codec": ((str, Codec), 'a name, such as "raw", or a Codec'),
    "policy": ((str, Policy), 'a name, such as "fcfs", or a Policy'),
    "layered_finish": ((bool,), "True or False"),
    "calibration": ((str, os.PathLike, NoneType), "a file's path, or None"),
}


LONGEST_DEADLINE_S = 3e7
"""About a year. Who is more patient than that, up to infinity, waits as long: locks have their own limit."""


def patience(deadline_s: float) -> float:
    """A deadline as the system can wait for it, in seconds.

    Raises
    ------
    BadInput
        It is not a number of seconds above 0.
    """
    is_real = isinstance(deadline_s, Real) and not isinstance(deadline_s, bool)
    if not is_real or not deadline_s > 0:
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
    whole("chunk_tokens", chunk_tokens, 1, MOST_TOKENS)
    whole("max_span_tokens", max_span_tokens, 1, MOST_TOKENS)
    if max_span_tokens < chunk_tokens:
        raise BadInput(f"max_span_tokens must be at least chunk_tokens; got {max_span_tokens} and {chunk_tokens}")
    real("ttft_target_s", ttft_target_s, 0.0)
    if not 1 <= whole("quality_floor", quality_floor, 1) <= codec.parts_read:
        raise BadInput(
            f"quality_floor is {quality_floor}, but of codec {codec.name} 1 to {codec.parts_read} parts are read"
        )
