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
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from cakekv.codec.base import Code, Codec, DamagedCode, Plane, Values
from cakekv.codec.basis import Basis, PlaneBasis, find_basis
from cakekv.codec.elements import from_elements, to_elements
from cakekv.codec.kernels import compiled, turn
from cakekv.errors import BadInput
from cakekv.keys import canonical
from cakekv.rotation import Rotation

SINKS = 4
"""So many tokens at a prompt's beginning are kept exactly: nearly all others look at them."""
_BITS = 13
"""Of a probability."""
_SYMBOLS = 128
_MIDDLE = 64
_ESCAPE = 0
"""Stands for a number that its table has no symbol for, which follows in 26 bits."""
LEAST, _MOST = 0.02, 8.0
"""Mean sizes of a coefficient, in steps: below the first it is not coded; above the last its low bits are not modelled.
"""
_GROWTH = 1.25
_FARTHEST = float(1 << 24)
_LANES = 2
_HEAD = 4 * _LANES
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
                f"codec kvtc: the basis is for {known} elements of a token's {plane.role} in layer {plane.layer}, and "
                f"there are {plane.heads} heads of {plane.width}: it is another model's, or heads are in several shards"
            )

    def size(self, plane: Plane, part: int = 0) -> int:
        return _HEAD + _index(plane).itemsize * (1 + plane.tokens) + plane.raw_bytes

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        transform = self._transform(plane)
        (cosine, sine), interleaved = _turns(plane)
        back = values.copy()
        turn(back, cosine, -sine, interleaved)
        numbers = transform.numbers(back)
        exact = ~(np.abs(numbers).max(1, initial=0) < _FARTHEST)
        exact[: max(0, SINKS - plane.start)] = True
        coded = np.ascontiguousarray(np.rint(numbers[~exact]).astype(np.int32).T)
        room = (self.size(plane) - _HEAD) // 2
        words = np.empty(room, np.uint16)
        states = np.empty(_LANES, np.uint32)
        begin = _encode(coded, transform.tables, transform.shifts, states, words, *_CODING)
        index = np.flatnonzero(exact)
        if begin < 0 or index.size * (transform.elements * plane.itemsize + 2) + 2 * (room - begin) > plane.raw_bytes:
            index, begin, states[:] = np.arange(plane.tokens), room, 1 << 16
        kept = np.empty(index.size * transform.elements * plane.itemsize, np.uint8)
        to_elements(np.ascontiguousarray(values[:, index]), plane.dtype, kept)
        kind = _index(plane)
        pieces = [states.astype("<u4"), np.array([index.size], kind), index.astype(kind), kept]
        pieces.append(words[begin:].astype("<u2"))
        data = np.frombuffer(b"".join(piece.tobytes() for piece in pieces), np.uint8)
        code[: data.size] = data
        return int(data.size)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        transform, kind, data = self._transform(plane), _index(plane), codes[0].tobytes()
        at = _HEAD + kind.itemsize
        if len(data) < at:
            raise DamagedCode(f"a code of {len(data)} bytes")
        states = np.frombuffer(data, "<u4", _LANES).astype(np.uint32)
        count = int(np.frombuffer(data, kind, 1, _HEAD)[0])
        kept = count * transform.elements * plane.itemsize
        body = at + count * kind.itemsize + kept
        if count > plane.tokens or len(data) < body or (len(data) - body) % 2:
            raise DamagedCode(f"a code of {len(data)} bytes with {count} exact tokens")
        index = np.frombuffer(data, kind, count, at).astype(np.int64)
        if (index >= plane.tokens).any() or (np.diff(index) <= 0).any():
            raise DamagedCode("exact tokens that are nowhere")
        raw = np.frombuffer(data, np.uint8, kept, at + count * kind.itemsize).copy()
        exact = from_elements(raw, plane.dtype, (plane.heads, count, plane.width))
        words = np.frombuffer(data, "<u2", offset=body).astype(np.uint16)
        numbers = np.empty((transform.tables.size, plane.tokens - count), np.float32)
        if not _decode(words, states, transform.tables, transform.shifts, *_CODING, numbers):
            raise DamagedCode("a stream that does not end as it should")
        others = np.delete(np.arange(plane.tokens), index) if count else slice(None)
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
    def _transforms(self) -> dict[tuple[str, int], _Transform]:
        return {}

    def _transform(self, plane: Plane) -> _Transform:
        """How this codec does with a plane; made when first needed. Two threads may make it twice."""
        key = plane.role, plane.layer
        made = self._transforms.get(key)
        if made is None:
            self.check_plane(plane)
            made = self._transforms[key] = _Transform(self._learned.planes[key], self._step)
        return made


class _Transform:
    """A plane's basis at a size of step.

    Attributes
    ----------
    elements : int
        Of a token.
    tables, shifts : array
        Of every coefficient that is coded: which distribution, and how many low bits are as they are.
    """

    def __init__(self, basis: PlaneBasis, step: float) -> None:
        self._basis, self._step = basis, np.float32(step)
        self.elements = basis.elements
        sizes = basis.spread / step
        self._coded = [int(np.flatnonzero(block >= LEAST).max(initial=-1)) + 1 for block in sizes]
        used = np.concatenate([block[:coded] for block, coded in zip(sizes, self._coded, strict=True)])
        self.tables, self.shifts = tables_for(used)
        self._rows = [
            (rows[:coded] * scale[:coded, None] * self._step).astype(np.float32)
            for rows, scale, coded in zip(basis.rows, basis.scale, self._coded, strict=True)
        ]

    @cached_property
    def _columns(self) -> list[Values]:
        inverses = zip(self._basis.inverse, self._coded, strict=True)
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
        ends = np.cumsum(self._coded)[:-1]
        pieces = zip(np.split(numbers, ends, 1), self._rows, self._basis.mean, strict=True)
        flat = np.concatenate([_product(piece, rows) + mean for piece, rows, mean in pieces], 1)
        return flat.reshape(-1, plane.heads, plane.width).transpose(1, 0, 2)


def tables_for(sizes: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which table, and how many low bits apart, for coefficients of these mean sizes in steps."""
    shifts = np.clip(np.ceil(np.log2(np.maximum(sizes, _MOST) / _MOST)), 0, _BITS).astype(np.int64)
    within = np.clip(sizes / 2.0**shifts, LEAST, _MOST)
    return np.rint(np.log(within / LEAST) / np.log(_GROWTH)).astype(np.int64), shifts


def costs_of(numbers: npt.NDArray[np.float32], tables: npt.NDArray[np.int64], shifts: npt.NDArray[np.int64]) -> float:
    """Bits that coefficients, (tokens, coefficients) in steps, take."""
    symbols = (np.rint(numbers).astype(np.int64) >> shifts) + _MIDDLE
    inside = np.clip(symbols, 0, _SYMBOLS - 1)
    counts = np.where(symbols == inside, _CODING.frequencies[tables, inside], 0)
    escapes = (counts == 0) | (inside == _ESCAPE)
    counts = np.where(escapes, _CODING.frequencies[tables, _ESCAPE], counts)
    follow = np.where(escapes, 2 * _BITS, shifts)
    return float((_BITS - np.log2(counts) + follow).sum())


def _index(plane: Plane) -> np.dtype[np.unsignedinteger[npt.NBitBase]]:
    return np.dtype("<u2" if plane.tokens < 1 << 16 else "<u4")


def _turns(plane: Plane) -> tuple[npt.NDArray[np.float32], bool]:
    """How a plane is turned, and whether neighbours are pairs."""
    rotation = plane.rotation if plane.role == "keys" and plane.rotation else _UNTURNED
    return rotation.turns(plane.start, plane.tokens), rotation.interleaved


class _Coding(NamedTuple):
    """Distributions of symbols, (tables, symbols), in 2**13; those of frequency 0 are escaped."""

    frequencies: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.uint16]
    lookup: npt.NDArray[np.uint8]


def _coding() -> _Coding:
    """Two-sided exponentials with a wider foot, a quarter wider from table to table."""
    count = round(np.log(_MOST / LEAST) / np.log(_GROWTH)) + 1
    distance = np.abs(np.arange(_SYMBOLS) - _MIDDLE)
    frequencies = np.zeros((count, _SYMBOLS), np.uint16)
    for table in range(count):
        shares = np.zeros(_SYMBOLS)
        for share, wider in ((0.92, 0.9), (0.08, 2.15)):
            mean = LEAST * _GROWTH**table * wider
            # the geometric distribution of this mean size: P(k) = P(0) * ratio ** abs(k)
            ratio = (np.sqrt(1 + mean * mean) - 1) / mean
            shares += share * (1 - ratio) / (1 + ratio) * ratio**distance
        shares[_ESCAPE] = 0.0
        counts = np.floor(shares * ((1 << _BITS) - 2)).astype(np.int64)
        counts[_ESCAPE] = 2
        counts[_MIDDLE] += (1 << _BITS) - counts.sum()
        frequencies[table] = counts
    starts = (np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies).astype(np.uint16)
    lookup = np.stack([np.repeat(np.arange(_SYMBOLS, dtype=np.uint8), counts) for counts in frequencies])
    return _Coding(frequencies, starts, lookup)


_CODING = _coding()


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
        table, shift = tables[c], shifts[c]
        for t in range(tokens - 1, -1, -1):
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
        shift, row = shifts[c], numbers[c]
        symbols, counts, below = lookup[tables[c]], frequencies[tables[c]], starts[tables[c]]
        for t in range(tokens):
            state = states[t & 1]
            slot = state & mask
            symbol = symbols[slot]
            state = np.uint32(counts[symbol]) * (state >> np.uint32(13)) + slot - np.uint32(below[symbol])
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
