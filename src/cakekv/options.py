"""What a `Cake` is told, and what each call of it is told: checked once, frozen, and handed on whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

from cakekv.codec import codec_named
from cakekv.codec.base import Codec
from cakekv.compress import methods_named
from cakekv.compress.base import Method
from cakekv.decode import sight_named
from cakekv.decode.base import Sight
from cakekv.engine.choice import Sampling
from cakekv.errors import BadInput
from cakekv.prompt import check_text
from cakekv.quantities import parse_bytes, real, whole
from cakekv.restore.options import MODES, Mode
from cakekv.restore.priority import Policy, open_policy
from cakekv.results import OnProgress
from cakekv.reuse import reuse_named
from cakekv.reuse.base import Reuse

if TYPE_CHECKING:
    from cakekv.metrics import Metrics

MOST_TOKENS = 2**31 - 1
"""Of a chunk, or a span."""
LONGEST_DEADLINE_S = 3e7
"""About a year. Who is more patient than that, up to infinity, waits as long: locks have their own limit."""


class CakeKeywords(TypedDict, total=False):
    """The options of `Cake`, which says what they are, as keyword arguments."""

    chunk_tokens: int
    max_span_tokens: int
    tenant: str
    codec: str | Codec
    policy: str | Policy
    layered_finish: bool
    deadline_s: float
    save_queue: int | str
    save_answers: bool
    ttft_target_s: float
    quality_floor: int
    reuse: str | Reuse | None
    compress: str | Method | Sequence[str | Method] | None
    compress_front: bool
    decode: str | Sight | None
    learn: bool
    calibration: str | os.PathLike[str] | None
    metrics: Metrics | None


@dataclass(frozen=True, kw_only=True)
class CakeOptions:
    """The options of a `Cake`, which says what they are: all in range, and names replaced by what they name."""

    chunk_tokens: int
    max_span_tokens: int
    tenant: str = field(repr=False)
    codec: Codec
    policy: Policy
    layered_finish: bool
    deadline_s: float
    save_queue: int
    """In bytes."""
    save_answers: bool
    ttft_target_s: float
    quality_floor: int
    reuse: Reuse | None
    compress: tuple[Method, ...]
    compress_front: bool
    decode: Sight | None
    learn: bool
    calibration: str | os.PathLike[str] | None
    metrics: Metrics | None

    @classmethod
    def of(cls, **given: Unpack[CakeKeywords]) -> Self:
        """The options as a caller gives them, all of them.

        Raises
        ------
        BadInput
            One is of another kind than it must be, or out of range.
        """
        _check_kinds(given)
        codec, policy, reuse, decode = given["codec"], given["policy"], given["reuse"], given["decode"]
        return cls(
            chunk_tokens=whole("chunk_tokens", given["chunk_tokens"], 1, MOST_TOKENS),
            max_span_tokens=whole("max_span_tokens", given["max_span_tokens"], 1, MOST_TOKENS),
            tenant=given["tenant"],
            codec=codec_named(codec) if isinstance(codec, str) else codec,
            policy=open_policy(policy) if isinstance(policy, str) else policy,
            layered_finish=given["layered_finish"],
            deadline_s=_deadline(given["deadline_s"]),
            save_queue=_queue_bytes(given["save_queue"]),
            save_answers=given["save_answers"],
            ttft_target_s=real("ttft_target_s", given["ttft_target_s"], 0.0),
            quality_floor=whole("quality_floor", given["quality_floor"], 1),
            reuse=reuse_named(reuse) if isinstance(reuse, str) else reuse,
            compress=methods_named(given["compress"]),
            compress_front=given["compress_front"],
            decode=sight_named(decode) if isinstance(decode, str) else decode,
            learn=given["learn"],
            calibration=given["calibration"],
            metrics=given["metrics"],
        )

    def __post_init__(self) -> None:
        """Raises `BadInput` if options contradict each other."""
        span, chunk, codec = self.max_span_tokens, self.chunk_tokens, self.codec
        if span < chunk:
            raise BadInput(f"max_span_tokens must be at least chunk_tokens; got {span} and {chunk}")
        if self.quality_floor > codec.parts_read:
            raise BadInput(
                f"quality_floor is {self.quality_floor}, "
                f"but of codec {codec.name} 1 to {codec.parts_read} parts are read"
            )
        if self.compress_front and not any("store" in method.at for method in self.compress):
            raise BadInput(
                "compress_front makes of what is computed what is stored of it: give a compress that acts at store, "
                "such as key_norm:share=0.5, or leave it out"
            )


class AnswerKeywords(TypedDict, total=False):
    """Keyword arguments of `Cake.stream`, which says what they are."""

    max_new_tokens: int
    mode: Mode
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    save: bool
    on_progress: OnProgress | None
    tenant: str | None


@dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """What is asked of one prefill; as in `Cake.prefill`."""

    mode: Mode = "auto"
    save: bool = True
    on_progress: OnProgress | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        """Raises `BadInput` if something is not what it must be."""
        if self.mode not in MODES:
            raise BadInput(f"unknown mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if not isinstance(self.save, bool):
            raise BadInput(f"save must be True or False, not {self.save!r:.60}")
        if self.on_progress is not None and not callable(self.on_progress):
            raise BadInput(f"on_progress must be a function that takes a Progress, not {self.on_progress!r:.60}")
        if self.tenant is not None:
            if not isinstance(self.tenant, str):
                raise BadInput(f"tenant must be text, or None, not of type {type(self.tenant).__name__}")
            check_text(self.tenant, "tenant")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(PrefillOptions):
    """What is asked of one answer; as in `Cake.stream`. `Sampling` checks what is to be sampled by."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises `BadInput` if something is not what it must be."""
        super().__post_init__()
        whole("max_new_tokens", self.max_new_tokens, 1)
        stop = self.stop
        if not isinstance(stop, str | list | tuple | NoneType) or any(not isinstance(one, str) for one in stop or ()):
            raise BadInput(f"stop must be a text, or a list of them, not {stop!r:.60}")
        for one in self.stops:
            check_text(one, "stop")
            if not one:
                raise BadInput("a stop text is empty: leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(**{one.name: getattr(self, one.name) for one in fields(Sampling)})


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "tenant": ((str,), "text"),
    "codec": ((str, Codec), 'a name, such as "raw", or a Codec'),
    "policy": ((str, Policy), 'a name, such as "fcfs", or a Policy'),
    "layered_finish": ((bool,), "True or False"),
    "save_answers": ((bool,), "True or False"),
    "reuse": ((str, Reuse, NoneType), 'a name, such as "epic:link=16", a Reuse, or None'),
    "compress": (
        (str, Method, list, tuple, NoneType),
        'a name, such as "corm:window=64", a Method, a list of them, or None',
    ),
    "compress_front": ((bool,), "True or False"),
    "decode": ((str, Sight, NoneType), 'a name, such as "clusterkv:budget=512", a Sight, or None'),
    "learn": ((bool,), "True or False"),
    "calibration": ((str, os.PathLike, NoneType), "a file's path, or None"),
}


def _check_kinds(given: Mapping[str, object]) -> None:
    """Refuse what is of another kind than it must be. What it holds may be secret, and is not told."""
    for name, (kinds, what) in _KINDS.items():
        value = given[name]
        if not isinstance(value, kinds):
            raise BadInput(f"{name} must be {what}, not of type {type(value).__name__}")
        if isinstance(value, str):
            check_text(value, name)
    metrics = given["metrics"]
    if metrics is not None and not callable(getattr(metrics, "add_restore", None)):  # its module needs an extra
        raise BadInput(f"metrics is of type {type(metrics).__name__}: give cakekv.metrics.Metrics(), or None")


def _deadline(deadline_s: object) -> float:
    """A deadline as the system can wait for it, in seconds."""
    seconds = real("deadline_s", deadline_s, 0.0)
    if not seconds:
        raise BadInput(f"deadline_s must be above 0, such as 30, or inf; not {deadline_s!r}")
    return min(seconds, LONGEST_DEADLINE_S)


def _queue_bytes(save_queue: int | str) -> int:
    """The size of a save queue, in bytes."""
    if isinstance(save_queue, bool) or not isinstance(save_queue, int | str):
        raise BadInput(f'save_queue is a size, such as "1GB" or 1000000000; not {save_queue!r}')
    try:
        return parse_bytes(save_queue)
    except BadInput as error:
        raise BadInput(f"save_queue: {error}") from error
