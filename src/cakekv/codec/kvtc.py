"""A transform learned from the model, and entropy coding, after KVTC (arXiv 2511.01815).

As in the paper, keys (before RoPE) and values become coefficients along axes learned once per model, few of which take
any bits, and the prompt's first tokens stay exact. Unlike the paper's, axes span one layer (at most 256 elements of
it), so that any layer can be read alone; and they are chosen, and bits shared out, not by how much coefficients vary
but by how much an error in them changes what the model says (`cakekv.codec.learning`). One step for all coefficients
shares out bits as reverse water-filling does. Each is entropy coded (rANS, arXiv 1402.3392) by a distribution of its
own width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from cakekv.codec.base import Code, Codec, DamagedCode, Plane, Values
from cakekv.codec.basis import Basis, PlaneBasis, find_basis
from cakekv.codec.elements import from_elements, to_elements
from cakekv.codec.kernels import compiled, turn
from cakekv.errors import BadInput
from cakekv.keys import canonical
from cakekv.rotation import Rotation

Integers = npt.NDArray[np.int64]

SINKS = 4
"""So many tokens at a prompt's beginning are kept exactly: nearly all others look at them."""
BITS = 13
"""Of a probability."""
SYMBOLS = 128
MIDDLE = 64
ESCAPE = 0
"""Stands for a number that its table has no symbol for, which follows in 26 bits."""
LEAST, _MOST = 0.02, 8.0
"""Mean sizes of a coefficient, in steps: below the first it is not coded; above the last its low bits are not modelled.
"""
_GROWTH = 1.25
_FARTHEST = float(1 << 24)
_LANES = 2
HEAD = 4 * _LANES
_UNTURNED = Rotation(())


@dataclass(frozen=True)
class Kvtc(Codec):
    """Sizes vary from chunk to chunk. Needs a basis, which `cakekv codec learn` makes of a model.

    Parameters
    ----------
    bits : float
        Per element, on average over the texts that the basis was learned from.
    """

    name: ClassVar[str] = "kvtc"
    fixed: ClassVar[bool] = False
    bits: float = 2.0
    if TYPE_CHECKING:
        _basis: ClassVar[Basis | None]  # of an instance, in truth, but no parameter

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("bits", 0.02 <= self.bits <= 12, "from 0.02 to 12")
        self._bind(None)

    def _bind(self, basis: Basis | None) -> None:
        object.__setattr__(self, "_basis", basis)

    def for_model(self, weights: Iterable[str]) -> Kvtc:
        return self if self._basis else self.with_basis(find_basis(weights))

    def with_basis(self, basis: Basis) -> Kvtc:
        """The same codec, with this basis."""
        bound = replace(self)
        bound._bind(basis)
        _ = bound._step
        return bound

    @property
    def turns_back(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        """With the digest of the basis, once it has one."""
        base = super().fingerprint
        return canonical({"base": base, "basis": self._basis.digest}) if self._basis else base

    def check_plane(self, plane: Plane) -> None:
        basis = self._learned.planes.get((plane.role, plane.layer))
        known = basis.elements if basis else 0
        if known != plane.heads * plane.width:
            raise BadInput(
                f"codec {self.name}: the basis is for {known} elements of a token's {plane.role} in layer "
                f"{plane.layer}, and there are {plane.heads} heads of {plane.width}: it is another model's, or heads "
                "are in several shards"
            )

    def size(self, plane: Plane, part: int = 0) -> int:
        return HEAD + _index(plane).itemsize * (1 + plane.tokens) + plane.raw_bytes

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        transform = self._transform(plane)
        numbers, exact = self._numbers(plane, transform, values)
        data, _ = self._written(plane, transform, values, numbers, exact)
        code[: data.size] = data
        return int(data.size)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        transform = self._transform(plane)
        numbers, index, exact = self._read(plane, transform, codes[0])
        self._restore(plane, transform, numbers, index, exact, values)

    def _numbers(
        self, plane: Plane, transform: Transform, values: Values
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """(coefficients, tokens), in whole steps, and which tokens are to be kept exactly instead."""
        (cosine, sine), interleaved = _turns(plane)
        back = values.copy()
        turn(back, cosine, -sine, interleaved)
        numbers = transform.numbers(back)
        exact = ~(np.abs(numbers).max(1, initial=0) < _FARTHEST)
        exact[: max(0, SINKS - plane.start)] = True
        numbers[exact] = 0
        return np.ascontiguousarray(np.rint(numbers).astype(np.int32).T), exact

    def _written(
        self,
        plane: Plane,
        transform: Transform,
        values: Values,
        numbers: npt.NDArray[np.int32],
        exact: npt.NDArray[np.bool_],
    ) -> tuple[Code, Integers]:
        """A plane's code, and which tokens it keeps exactly: all, if it were longer than the plane otherwise."""
        coded = numbers[:, ~exact]
        states, words = stream_of(coded, transform.tables, transform.shifts, CODING, (self.size(plane) - HEAD) // 2)
        index = np.flatnonzero(exact)
        token_bytes = transform.elements * plane.itemsize
        if words is None or index.size * (token_bytes + 2) + words.nbytes > plane.raw_bytes:
            states, words = stream_of(coded[:, :0], transform.tables, transform.shifts, CODING, 0)
            assert words is not None, "there are none to write"
            index = np.arange(plane.tokens)
        kept = np.empty(index.size * token_bytes, np.uint8)
        to_elements(np.ascontiguousarray(values[:, index]), plane.dtype, kept)
        kind = _index(plane)
        pieces: list[npt.NDArray[Any]] = [states, np.array([index.size], kind), index.astype(kind), kept, words]
        return np.frombuffer(b"".join(piece.tobytes() for piece in pieces), np.uint8), index

    def _read(self, plane: Plane, transform: Transform, code: Code) -> tuple[npt.NDArray[np.float32], Integers, Values]:
        """The reverse: (coefficients, tokens that are not exact), which tokens are exact, and these."""
        kind, data = _index(plane), code.tobytes()
        at = HEAD + kind.itemsize
        if len(data) < at:
            raise DamagedCode(f"a code of {len(data)} bytes")
        count = int(np.frombuffer(data, kind, 1, HEAD)[0])
        kept = count * transform.elements * plane.itemsize
        body = at + count * kind.itemsize + kept
        if count > plane.tokens or len(data) < body or (len(data) - body) % 2:
            raise DamagedCode(f"a code of {len(data)} bytes with {count} exact tokens")
        index = np.frombuffer(data, kind, count, at).astype(np.int64)
        if (index >= plane.tokens).any() or (np.diff(index) <= 0).any():
            raise DamagedCode("exact tokens that are nowhere")
        raw = np.frombuffer(data, np.uint8, kept, at + count * kind.itemsize).copy()
        exact = from_elements(raw, plane.dtype, (plane.heads, count, plane.width))
        numbers = np.empty((transform.tables.size, plane.tokens - count), np.float32)
        read_stream(data[:HEAD], data[body:], transform.tables, transform.shifts, CODING, numbers)
        return numbers, index, exact

    def _restore(
        self,
        plane: Plane,
        transform: Transform,
        numbers: npt.NDArray[np.float32],
        index: Integers,
        exact: Values,
        values: Values,
    ) -> None:
        """Fill `values` from what `_read` found."""
        others = np.delete(np.arange(plane.tokens), index) if index.size else slice(None)
        values[:, index] = 0
        values[:, others] = transform.values(numbers.T, plane)
        (cosine, sine), interleaved = _turns(plane)
        turn(values, cosine, sine, interleaved)
        values[:, index] = exact
        if not np.isfinite(values).all():
            raise DamagedCode("elements that are no numbers")
        if plane.dtype == "float16":
            np.clip(values, -65504, 65504, out=values)

    @property
    def _learned(self) -> Basis:
        return self._basis or find_basis(())

    @cached_property
    def _step(self) -> float:
        return self._learned.step_for(self.bits)

    @cached_property
    def _transforms(self) -> dict[tuple[str, int, int], Transform]:
        return {}

    def _transform(self, plane: Plane, steps: int = 1) -> Transform:
        """How this codec does with a plane, with a step so many times as large; made when first needed.

        Two threads may make it twice.
        """
        key = plane.role, plane.layer, steps
        made = self._transforms.get(key)
        if made is None:
            self.check_plane(plane)
            basis = self._learned.planes[plane.role, plane.layer]
            made = self._transforms[key] = Transform(basis, self._step * steps)
        return made


class Transform:
    """A plane's basis at a size of step.

    Attributes
    ----------
    elements : int
        Of a token.
    coded : list of int
        How many of each block's coefficients are coded: the first ones.
    tables, shifts : array
        (coefficients, 1): of each that is coded, which distribution, and how many low bits are as they are.
    """

    def __init__(self, basis: PlaneBasis, step: float) -> None:
        self._basis, self._step = basis, np.float32(step)
        self.elements = basis.elements
        sizes = basis.spread / step
        self.coded = [int(np.flatnonzero(block >= LEAST).max(initial=-1)) + 1 for block in sizes]
        used = np.concatenate([block[:coded] for block, coded in zip(sizes, self.coded, strict=True)])
        self.tables, self.shifts = (one[:, None] for one in tables_for(used))
        self._rows = [
            (rows[:coded] * scale[:coded, None] * self._step).astype(np.float32)
            for rows, scale, coded in zip(basis.rows, basis.scale, self.coded, strict=True)
        ]

    @cached_property
    def _columns(self) -> list[Values]:
        inverses = zip(self._basis.inverse, self.coded, strict=True)
        return [np.ascontiguousarray(inverse[:, :coded] / self._step) for inverse, coded in inverses]

    def numbers(self, values: Values) -> npt.NDArray[np.float32]:
        """(tokens, coefficients), in steps, of a plane's elements."""
        tokens = values.shape[1]
        flat = values.transpose(1, 0, 2).reshape(tokens, len(self._rows), -1)
        blocks = enumerate(zip(self._basis.mean, self._columns, strict=True))
        with np.errstate(over="ignore", invalid="ignore"):  # a token that is too far out stays exact
            return np.concatenate([_product(flat[:, block] - mean, columns) for block, (mean, columns) in blocks], 1)

    def values(self, numbers: npt.NDArray[np.float32], plane: Plane) -> Values:
        """The reverse: (heads, tokens, width)."""
        ends = np.cumsum(self.coded)[:-1]
        pieces = zip(np.split(numbers, ends, 1), self._rows, self._basis.mean, strict=True)
        flat = np.concatenate([_product(piece, rows) + mean for piece, rows, mean in pieces], 1)
        return flat.reshape(-1, plane.heads, plane.width).transpose(1, 0, 2)


def tables_for(sizes: npt.NDArray[np.float32]) -> tuple[Integers, Integers]:
    """Which table, and how many low bits apart, for coefficients of these mean sizes in steps."""
    shifts = np.clip(np.ceil(np.log2(np.maximum(sizes, _MOST) / _MOST)), 0, BITS).astype(np.int64)
    within = np.clip(sizes / 2.0**shifts, LEAST, _MOST)
    return np.rint(np.log(within / LEAST) / np.log(_GROWTH)).astype(np.int64), shifts


def costs_of(numbers: npt.NDArray[np.float32], tables: Integers, shifts: Integers) -> float:
    """Bits that coefficients, (tokens, coefficients) in steps, take."""
    symbols = (np.rint(numbers).astype(np.int64) >> shifts) + MIDDLE
    inside = np.clip(symbols, 0, SYMBOLS - 1)
    counts = np.where(symbols == inside, CODING.frequencies[tables, inside], 0)
    escapes = (counts == 0) | (inside == ESCAPE)
    counts = np.where(escapes, CODING.frequencies[tables, ESCAPE], counts)
    follow = np.where(escapes, 2 * BITS, shifts)
    return float((BITS - np.log2(counts) + follow).sum())


def _index(plane: Plane) -> np.dtype[np.unsignedinteger[npt.NBitBase]]:
    return np.dtype("<u2" if plane.tokens < 1 << 16 else "<u4")


def _turns(plane: Plane) -> tuple[npt.NDArray[np.float32], bool]:
    """How a plane is turned, and whether neighbours are pairs."""
    rotation = plane.rotation if plane.role == "keys" and plane.rotation else _UNTURNED
    return rotation.turns(plane.start, plane.tokens), rotation.interleaved


class Coding(NamedTuple):
    """Distributions of symbols, (tables, symbols), in 2**13; those of frequency 0 are escaped."""

    frequencies: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.uint16]
    lookup: npt.NDArray[np.uint8]


def coding_of(frequencies: npt.NDArray[np.uint16]) -> Coding:
    """Distributions with these frequencies."""
    starts = (np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies).astype(np.uint16)
    lookup = np.stack([np.repeat(np.arange(SYMBOLS, dtype=np.uint8), counts) for counts in frequencies])
    return Coding(frequencies, starts, lookup)


def _shares() -> npt.NDArray[np.float64]:
    """(tables, symbols): two-sided exponentials with a wider foot, a quarter wider from table to table."""
    count = round(np.log(_MOST / LEAST) / np.log(_GROWTH)) + 1
    distance = np.abs(np.arange(SYMBOLS) - MIDDLE)
    tables = np.zeros((count, SYMBOLS))
    for table, shares in enumerate(tables):
        for share, wider in ((0.92, 0.9), (0.08, 2.15)):
            mean = LEAST * _GROWTH**table * wider
            # the geometric distribution of this mean size: P(k) = P(0) * ratio ** abs(k)
            ratio = (np.sqrt(1 + mean * mean) - 1) / mean
            shares += share * (1 - ratio) / (1 + ratio) * ratio**distance
    return tables


def _frequencies(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    counts = np.floor(shares * ((1 << BITS) - 2)).astype(np.int64)
    counts[:, ESCAPE] = 2
    counts[:, MIDDLE] += (1 << BITS) - counts.sum(1)
    return counts.astype(np.uint16)


SHARES = _shares()
CODING = coding_of(_frequencies(SHARES))


def stream_of(
    numbers: npt.NDArray[np.int32],
    tables: Integers,
    shifts: Integers,
    coding: Coding,
    room: int,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16] | None]:
    """Code numbers, (coefficients, tokens), with a distribution for each, or for each row.

    Returns the states that reading begins with, `HEAD` bytes, and the words to read; None if there are more than
    `room` of these.
    """
    words, states = np.empty(room, np.uint16), np.empty(_LANES, np.uint32)
    begin = _encode(
        np.ascontiguousarray(numbers), _each(numbers, tables), _each(numbers, shifts), states, words, *coding
    )
    return states.astype("<u4"), words[begin:].astype("<u2") if begin >= 0 else None


def _each(numbers: npt.NDArray[Any], of_rows: Integers) -> Integers:
    """Of every number what is given for each, or for each row."""
    return np.ascontiguousarray(np.broadcast_to(of_rows, numbers.shape))


def read_stream(
    states: bytes,
    words: bytes,
    tables: Integers,
    shifts: Integers,
    coding: Coding,
    numbers: npt.NDArray[np.float32],
) -> None:
    """The reverse: fill `numbers`; raises `DamagedCode` if the stream does not end as it should."""
    lanes = np.frombuffer(states, "<u4").astype(np.uint32)
    each = _each(numbers, tables), _each(numbers, shifts)
    if not _decode(np.frombuffer(words, "<u2").astype(np.uint16), lanes, *each, *coding, numbers):
        raise DamagedCode("a stream that does not end as it should")


@compiled
def _product(left, right):  # type: ignore[no-untyped-def]
    """Of two matrices. Loader threads would wait for each other in a BLAS with threads of its own."""
    product = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for i in range(left.shape[0]):
        row = product[i]
        for j in range(left.shape[1]):
            factor = left[i, j]
            if factor != 0:  # as many coefficients are
                for k in range(row.size):
                    row[k] += factor * right[j, k]
    return product


@compiled
def _push(states, lane, start, frequency, words, at):  # type: ignore[no-untyped-def]
    """Code what has this share of 2**13; returns where the words begin now, -1 if there is no room."""
    state = states[lane]
    if state >= (np.uint64(frequency) << np.uint64(19)):
        if at == 0:
            return -1
        at -= 1
        words[at] = np.uint16(state & np.uint64(0xFFFF))
        state >>= np.uint64(16)
    share = np.uint64(frequency)
    states[lane] = ((state // share) << np.uint64(13)) + state % share + np.uint64(start)
    return at


@compiled
def _encode(numbers, tables, shifts, last, words, frequencies, starts, lookup):  # type: ignore[no-untyped-def]
    """Fill `words` from its end and `last` with the coder's states; returns where words begin, -1 if they are full."""
    coefficients, tokens = numbers.shape
    states = np.full(2, 1 << 16, np.uint64)
    at = words.size
    for c in range(coefficients - 1, -1, -1):
        for t in range(tokens - 1, -1, -1):
            table, shift = tables[c, t], shifts[c, t]
            number, lane = np.int64(numbers[c, t]), t & 1
            high = number >> shift
            symbol = high + 64
            if symbol <= 0 or symbol >= 128 or frequencies[table, symbol] == 0:
                whole = number + (1 << 25)
                at = _push(states, lane, whole & 0x1FFF, 1, words, at)
                if at >= 0:
                    at = _push(states, lane, whole >> 13, 1, words, at)
                symbol = 0
            elif shift > 0:
                at = _push(states, lane, (number & ((1 << shift) - 1)) << (13 - shift), 1 << (13 - shift), words, at)
            if at >= 0:
                at = _push(states, lane, starts[table, symbol], frequencies[table, symbol], words, at)
            if at < 0:
                return at
    for lane in range(2):
        last[lane] = np.uint32(states[lane])
    return at


@compiled
def _renewed(state, words, at):  # type: ignore[no-untyped-def]
    """A coder's state with another word, if it needs one, and where the next is; -1 if there is none."""
    if state < np.uint32(1 << 16):
        if at == words.size:
            return state, -1
        state = (state << np.uint32(16)) | np.uint32(words[at])
        at += 1
    return state, at


@compiled
def _decode(words, states, tables, shifts, frequencies, starts, lookup, numbers):  # type: ignore[no-untyped-def]
    """The reverse of `_encode`; whether the stream ended as it began. Any content will do."""
    coefficients, tokens = numbers.shape
    mask, least, at = np.uint32((1 << 13) - 1), np.uint32(1 << 16), 0
    for c in range(coefficients):
        row = numbers[c]
        for t in range(tokens):
            table, shift = tables[c, t], shifts[c, t]
            state = states[t & 1]
            slot = state & mask
            symbol = lookup[table, slot]
            share, below = np.uint32(frequencies[table, symbol]), np.uint32(starts[table, symbol])
            state = share * (state >> np.uint32(13)) + slot - below
            if state < least:
                if at == words.size:
                    return False
                state = (state << np.uint32(16)) | np.uint32(words[at])
                at += 1
            if symbol == 0:
                whole = np.int64(0)
                for _ in range(2):
                    whole = (whole << 13) | np.int64(state & mask)
                    state, at = _renewed(np.uint32(state >> np.uint32(13)), words, at)
                    if at < 0:
                        return False
                row[t] = np.float32(whole - (1 << 25))
            else:
                number = np.int64(symbol) - 64
                if shift > 0:
                    slot = state & mask
                    low = np.int64(slot) >> (13 - shift)
                    share = np.uint32(1 << (13 - shift))
                    state = share * (state >> np.uint32(13)) + (slot & (share - np.uint32(1)))
                    state, at = _renewed(np.uint32(state), words, at)
                    if at < 0:
                        return False
                    number = (number << shift) | low
                row[t] = np.float32(number)
            states[t & 1] = state
    return at == words.size and states[0] == 1 << 16 and states[1] == 1 << 16
