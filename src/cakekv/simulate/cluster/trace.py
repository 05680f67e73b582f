"""Requests from a trace in Mooncake's format, repeated and sped up as asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from cakekv.errors import BadInput

BLOCK_TOKENS = 512
"""Tokens per id of a trace."""


class Arrival(NamedTuple):
    """A request of the trace: when a prompt arrives, and what it begins with."""

    arrived_s: float
    prompt_tokens: int
    blocks: Sequence[int]
    """Ids of its full blocks; equal ids mean equal prefixes."""


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival, and the time after which the trace may begin again."""

    requests: Sequence[Arrival]
    period_s: float

    def replay(self, count: int, speed_up: float) -> Iterator[Arrival]:
        """Yield `count` requests, arriving `speed_up` times as fast.

        Where the trace is too short it begins again with other users: every block id is new in each repetition.
        """
        stride = 1 + max((max(request.blocks) for request in self.requests if request.blocks), default=0)
        for index in range(count):
            repetition, place = divmod(index, len(self.requests))
            request = self.requests[place]
            blocks = request.blocks if not repetition else [block + repetition * stride for block in request.blocks]
            arrived_s = (request.arrived_s + repetition * self.period_s) / speed_up
            yield Arrival(arrived_s, request.prompt_tokens, blocks)


def read_trace(path: Path | None = None) -> Trace:
    """Read a trace.

    Timestamps of the published traces are multiples of three seconds; the requests of one timestamp are spread evenly
    over the time until the next one.

    Parameters
    ----------
    path : Path or None
        A file of JSON lines with `timestamp` (milliseconds), `input_length` and `hash_ids`; None for the sample that
        comes with the package.

    Raises
    ------
    BadInput
        The file cannot be read, is empty, or a line is not such a request.
    """
    try:
        sample = resources.files("cakekv.simulate") / "data" / "mooncake_conversation_sample.jsonl"
        lines = (sample if path is None else path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the trace {path} cannot be read: {error}") from error
    rows = [_read(line, f"{path or 'sample'}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BadInput(f"the trace {path} holds no requests")
    rows.sort(key=lambda row: row.arrived_s)
    times = sorted({row.arrived_s for row in rows})
    period_s = times[-1] - times[0] + (times[1] - times[0] if len(times) > 1 else 1.0)
    return Trace(_spread(rows, times, period_s), period_s)


def _read(line: str, where: str) -> Arrival:
    try:
        row = json.loads(line)
        arrived_s, tokens, blocks = row["timestamp"] / 1000.0, row["input_length"], row["hash_ids"]
        valid = (
            0 <= arrived_s < float("inf")
            and type(tokens) is int
            and tokens > 0
            and all(type(block) is int and block >= 0 for block in blocks)
            and len(blocks) >= tokens // BLOCK_TOKENS
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{where} is not a request with timestamp, input_length and hash_ids: {error!r}") from error
    if not valid:
        raise BadInput(
            f"{where}: timestamp and input_length must be positive, and hash_ids hold one id per {BLOCK_TOKENS} tokens"
        )
    return Arrival(arrived_s, tokens, blocks[: tokens // BLOCK_TOKENS])


def _spread(rows: list[Arrival], times: list[float], period_s: float) -> list[Arrival]:
    ends = dict(zip(times, [*times[1:], times[0] + period_s], strict=True))
    crowd: dict[float, int] = {}
    for row in rows:
        crowd[row.arrived_s] = crowd.get(row.arrived_s, 0) + 1
    spread: list[Arrival] = []
    place: dict[float, int] = {}
    for row in rows:
        at = row.arrived_s
        nth = place[at] = place.get(at, -1) + 1
        arrived_s = at + (ends[at] - at) * nth / crowd[at] - times[0]
        spread.append(row._replace(arrived_s=arrived_s))
    return spread
