"""`kvtc` in two parts: coefficients in steps five times as large, useful alone, and where in each step they are.

The larger steps hold five of the smaller each, none of them in part. So the first part is what `kvtc` writes with the
larger step, and both together give what it gives with the smaller one (embedded quantisation). The second part is
coded by the distributions of `kvtc`, given what the first part says; so both take little more than `kvtc` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cakekv.codec.base import Code, DamagedCode, Plane, Values
from cakekv.codec.kvtc import (
    BITS,
    CODING,
    HEAD,
    MIDDLE,
    SHARES,
    SYMBOLS,
    Coding,
    Integers,
    Kvtc,
    Transform,
    coding_of,
    read_stream,
    stream_of,
)

STEPS = 5
"""How many times as large the first part's steps are; odd, so that they hold whole small ones to either side."""
_REACH = STEPS // 2
_NEAR = 3
"""From this size on, less one, numbers of the first part share their distributions in the second."""


@dataclass(frozen=True)
class KvtcLadder(Kvtc):
    """Sizes vary from chunk to chunk. Needs a basis, which `cakekv codec learn` makes of a model.

    Parameters
    ----------
    bits : float
        Per element, as for `kvtc`: with both parts read, as near to the exact cache as that.
    read : {1, 2}
        How many parts loads read, at most. Both are always stored.
    """

    name: ClassVar[str] = "kvtc_ladder"
    parts: ClassVar[int] = 2
    choices: ClassVar[tuple[str, ...]] = ("read",)
    bits: float = 3.0
    read: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("read", 1 <= self.read <= self.parts, "1 or 2")

    @property
    def parts_read(self) -> int:
        return self.read

    @property
    def shares(self) -> tuple[float, ...]:
        first = self.bits / (self.bits + 4.2)  # roughly, on two models, from 1 to 6 bits
        return first, 1 - first

    def size(self, plane: Plane, part: int = 0) -> int:
        return super().size(plane) if part == 0 else HEAD + plane.raw_bytes

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        data = self._both(plane, values)[part]
        code[: data.size] = data
        return int(data.size)

    def _both(self, plane: Plane, values: Values) -> tuple[Code, Code]:
        """Both parts. All tokens are kept exactly if together they were longer than the plane otherwise."""
        fine, coarse = self._transform(plane), self._transform(plane, STEPS)
        numbers, exact = self._numbers(plane, fine, values)
        shared = _shared(fine, coarse)
        steps = (numbers[shared] + _REACH) // STEPS
        for kept in (exact, np.ones_like(exact)):
            first, index = self._written(plane, coarse, values, steps, kept)
            rest, known = np.delete(numbers, index, 1), np.delete(steps, index, 1)
            rest[shared] = (rest[shared] - STEPS * known) * _signs(known)
            tables, shifts = _distributions(fine, shared, known)
            states, words = stream_of(rest, tables, shifts, _CODING, plane.raw_bytes // 2)
            if words is not None and first.size + words.nbytes <= plane.raw_bytes:
                break
        assert words is not None, "there are none to write, at last"
        return first, np.frombuffer(states.tobytes() + words.tobytes(), np.uint8)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        fine, coarse = self._transform(plane), self._transform(plane, STEPS)
        known, index, exact = self._read(plane, coarse, codes[0])
        if len(codes) == 1:
            self._restore(plane, coarse, known, index, exact, values)
            return
        data, shared = codes[1].tobytes(), _shared(fine, coarse)
        if len(data) < HEAD or len(data) % 2:
            raise DamagedCode(f"a second part of {len(data)} bytes")
        tables, shifts = _distributions(fine, shared, known)
        numbers = np.empty((fine.tables.size, known.shape[1]), np.float32)
        read_stream(data[:HEAD], data[HEAD:], tables, shifts, _CODING, numbers)
        numbers[shared] = numbers[shared] * _signs(known) + STEPS * known
        self._restore(plane, fine, numbers, index, exact, values)


def _shared(fine: Transform, coarse: Transform) -> npt.NDArray[np.bool_]:
    """Which of the coefficients that are coded with the smaller step are so with the larger one, too."""
    pairs = zip(fine.coded, coarse.coded, strict=True)
    return np.concatenate([np.arange(coded) < both for coded, both in pairs])


def _signs(known: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """By which to multiply the rest of numbers, so that it is positive away from zero."""
    return np.where(known < 0, -1, 1).astype(known.dtype)


def _distributions(
    fine: Transform, shared: npt.NDArray[np.bool_], known: npt.NDArray[Any]
) -> tuple[Integers, Integers]:
    """Which table, and how many low bits apart, for every number of the second part."""
    shape = fine.tables.size, known.shape[1]
    tables, shifts = np.empty(shape, np.int64), np.zeros(shape, np.int64)
    tables[:] = fine.tables
    shifts[~shared] = fine.shifts[~shared]
    nearness = np.minimum(np.abs(known), _NEAR - 1).astype(np.int64)
    tables[shared] = len(SHARES) * (1 + nearness) + tables[shared]
    return tables, shifts


def _coding() -> Coding:
    """Those of `kvtc`, for coefficients that the first part has none of; then of what is within a larger step."""
    frequencies = [CODING.frequencies]
    within = np.arange(-_REACH, _REACH + 1)
    for nearness in range(_NEAR):
        last = (MIDDLE - 1 - _REACH) // STEPS if nearness == _NEAR - 1 else nearness
        shares = np.sum([SHARES[:, MIDDLE + STEPS * step + within] for step in range(nearness, last + 1)], axis=0)
        counts = 1 + np.floor(shares / shares.sum(1, keepdims=True) * ((1 << BITS) - STEPS)).astype(np.int64)
        counts[np.arange(len(counts)), counts.argmax(1)] += (1 << BITS) - counts.sum(1)
        table = np.zeros((len(counts), SYMBOLS), np.uint16)
        table[:, MIDDLE + within] = counts
        frequencies.append(table)
    return coding_of(np.concatenate(frequencies))


_CODING = _coding()
