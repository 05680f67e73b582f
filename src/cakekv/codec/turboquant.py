"""Every token rotated so that its coordinates are alike, and rounded to levels made for just that (TurboQuant,
arXiv 2504.19874, its MSE variant).

A rotated unit vector of width d has coordinates of density (1 - x²)^((d - 3) / 2), whatever it was before. So one table
of levels per width and number of bits does for all tokens of all models: nothing is calibrated. A token keeps its
norm, or rather the factor that brings its levels nearest to it, in seven bits.

The paper's rotation is one dense random matrix. Here the width is 2**k times an odd number m. The rotation is random
signs, then the Hadamard matrix of 2**k, then a dense random m × m matrix across the blocks: k + m steps, each a plain
addition or multiplication that a GPU repeats bit for bit. For a power of two that is the signed Hadamard transform.

The paper finds answers as good as an exact cache's at 3.5 bits. On a small model with heads 64 wide that does not hold:
there the paper's codec (`center=no`) with 5 bits for keys and 4 for values does no better than `k5v4`. Keys have large
means, and an attention sink has the smallest keys and values of all. Two things mend that:

- Each channel's mean over the chunk is taken away first, in a byte; but not from a token that is shorter with it, as a
  sink is, since errors are as large as what is rounded.
- The shortest token of each head and chunk, the sink if there is one, keeps eight bits more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from cakekv.codec.base import Code, Codec, Plane, Values
from cakekv.codec.kernels import compiled, put_codes, rows_of, unpack_row

if TYPE_CHECKING:
    import torch

_GRID = 1 << 16
"""Steps from 0 to 1 in which levels are solved."""
_ROUNDS = 2000
"""Many, because Lloyd's algorithm is slow to settle on 32 levels; they take a tenth of a second, once."""


@dataclass(frozen=True)
class TurboQuant(Codec):
    """At 5 and 4 bits fewer bytes than `k5v4` and, on the demo's model, half of its divergence.

    On Gemma 3 it diverges more than `k5v4`: a few wide channels of its keys decide the error of all. Inside the
    frontier on both models of `docs/codecs.md`: `kvtc:bits=3` takes fewer bytes and is nearer to the exact cache, but
    has to learn a model first, and decodes many times more slowly.

    Parameters
    ----------
    keys, values : {2, 3, 4, 5}
        Bits per element.
    center : bool
        Whether channels lose their means and the shortest token keeps more bits; without, it is the paper's codec.
    """

    name: ClassVar[str] = "turboquant"
    on_device: ClassVar[bool] = True
    keys: int = 5
    values: int = 4
    center: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("keys", "values"):
            self.check(field, getattr(self, field) in (2, 3, 4, 5), "2, 3, 4 or 5 bits")

    def size(self, plane: Plane, part: int = 0) -> int:
        return sum(self._lengths(plane)) + plane.heads * rows_of(self._bits(plane), plane.tokens) * plane.width

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        heads, tokens, width = plane.shape
        scales, shortest = np.zeros((3, heads), np.float32), np.zeros(heads, np.int32)
        norms = np.zeros((heads, tokens), np.uint8)
        means, rest = (np.zeros((heads, width), np.int8) for _ in range(2))
        fields, begin = (scales, norms, shortest, means, rest), sum(self._lengths(plane))
        _encode(values, self._bits(plane), self.center, *self._tables(plane), *fields, code[begin:])
        parts = (scales[0].astype("<f4"), norms, scales[1:].astype("<f4"), shortest.astype("<i4"), means, rest)
        stored = parts if self.center else parts[:2]
        code[:begin] = np.frombuffer(b"".join(part.tobytes() for part in stored), np.uint8)
        return len(code)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        heads, tokens, width = plane.shape
        ends = list(accumulate(self._lengths(plane)))
        pieces = [codes[0][begin:end].copy() for begin, end in pairwise([0, *ends])]
        scales, shortest = np.zeros((3, heads), np.float32), np.zeros(heads, np.int64)
        scales[0], norms = pieces[0].view("<f4"), pieces[1].reshape(heads, tokens)
        means = rest = np.zeros((heads, width), np.int8)
        if self.center:
            scales[1:] = pieces[2].view("<f4").reshape(2, heads)
            shortest = pieces[3].view("<i4").astype(np.int64) % tokens  # any bytes may come
            means, rest = (piece.view(np.int8).reshape(heads, width) for piece in pieces[4:])
        fields = (scales, norms, shortest, means, rest)
        _decode(codes[0][ends[-1] :], self._bits(plane), self.center, *self._tables(plane), *fields, values)

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        import torch

        from cakekv.codec.tensors import unpacked

        code, (heads, tokens, width) = codes[0], plane.shape
        tables = (torch.from_numpy(table).to(code.device, non_blocking=True) for table in self._tables(plane))
        levels, grades, signs, mix = tables
        begins = list(accumulate(self._lengths(plane), initial=0))

        def piece(index: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            part = code[:, begins[index] : begins[index + 1]].clone(memory_format=torch.contiguous_format)
            return part.view(dtype).view(len(code), *shape)

        norms = piece(1, torch.uint8, heads, tokens, 1)
        values = levels[unpacked(code[:, begins[-1] :], self._bits(plane), *plane.shape).int()]
        values.mul_(grades[(norms & 127).int()].mul_(piece(0, torch.float32, heads, 1, 1)))
        if self.center:
            mean_scale, rest_scale = piece(2, torch.float32, 2, heads, 1, 1).unbind(1)
            shortest = piece(3, torch.int32, heads, 1, 1).remainder(tokens).long().expand(-1, -1, -1, width)
            rest = piece(5, torch.int8, heads, 1, width).float().mul_(rest_scale)
            values.scatter_(2, shortest, values.gather(2, shortest).add_(rest))
        values = _turned_back(values, mix).mul_(signs)
        if self.center:
            means = piece(4, torch.int8, heads, 1, width).float().mul_(mean_scale)
            values.add_(means * (norms < 128))
        return values

    def _bits(self, plane: Plane) -> int:
        return self.keys if plane.role == "keys" else self.values

    def _tables(self, plane: Plane) -> tuple[Values, ...]:
        """Levels, grades, signs and mix."""
        return _levels(self._bits(plane), plane.width), _GRADES, *_rotation(plane.width)

    def _lengths(self, plane: Plane) -> tuple[int, ...]:
        """Bytes of what stands before the codes: heads' scales, tokens' norms; then, for means and for what the
        shortest token keeps besides, heads' scales, which token that is, and both.
        """
        heads, tokens, width = plane.shape
        usual = (4 * heads, heads * tokens)
        return (*usual, 8 * heads, 4 * heads, heads * width, heads * width) if self.center else usual


def _turned_back(values: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """What `_turn_back` does, to every row."""
    import torch

    shape, odd = values.shape, len(mix)
    if odd > 1:
        blocks = values.view(*shape[:-1], odd, -1)
        mixed = blocks[..., :1, :] * mix[0, :, None]
        for j in range(1, odd):
            mixed.add_(blocks[..., j : j + 1, :] * mix[j, :, None])
        values = mixed.flatten(-2)
    step = shape[-1] // odd // 2
    while step:
        one, other = values.view(*shape[:-1], -1, 2, step).unbind(-2)
        values = torch.stack((one + other, one - other), -2).view(shape)
        step //= 2
    return values


@lru_cache(maxsize=64)
def _levels(bits: int, width: int) -> Values:
    """The levels for the coordinates of a unit vector that leave the least square error: Lloyd's algorithm.

    Nothing but additions, multiplications, divisions and square roots, so that every machine finds the same.
    """
    at = (np.arange(_GRID) + 0.5) / _GRID
    root, weight = np.sqrt(1 - at * at), np.ones(_GRID)
    for _ in range(max(width, 3) - 3):  # narrower ones would have all their weight at the ends
        weight = weight * root
    below = np.concatenate([[0.0], np.cumsum(weight)])
    moment = np.concatenate([[0.0], np.cumsum(weight * at)])
    count = 1 << (bits - 1)  # above zero; those below are their mirror images
    share = (np.arange(count) + 0.5) / count
    levels = at[np.searchsorted(below[1:], share * below[-1])]
    for _ in range(_ROUNDS):
        edges = np.searchsorted(at, (levels[1:] + levels[:-1]) / 2)
        begins, ends = np.concatenate([[0], edges]), np.concatenate([edges, [_GRID]])
        levels = (moment[ends] - moment[begins]) / (below[ends] - below[begins])
    return np.concatenate([-levels[::-1], levels]).astype(np.float32)


def _grades() -> Values:
    """By what a head's greatest factor is multiplied for a token: eighths of an octave down."""
    eighth = np.sqrt(np.sqrt(np.sqrt(0.5)))
    within = [1.0]
    for _ in range(7):
        within.append(within[-1] * eighth)
    return np.array([within[grade % 8] * 0.5 ** (grade // 8) for grade in range(128)], np.float32)


_GRADES = _grades()


@lru_cache(maxsize=64)
def _rotation(width: int) -> tuple[Values, Values]:
    """Random signs, times what makes the Hadamard matrix orthogonal: (width,); and a random orthogonal matrix across
    the blocks of 2**k channels: (m, m), where the width is 2**k m.
    """
    bits = _random(width, width) >> np.uint64(63)
    block = width & -width
    signs = np.where(bits, -1.0, 1.0) / np.sqrt(block)
    odd = width // block
    mix = np.ones((1, 1))
    if odd > 1:
        uniform = (_random(~width, 12 * odd * odd) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        normal = np.zeros((odd, odd))
        for one in uniform.reshape(12, odd, odd):
            normal += one - 0.5  # the sum of twelve is normal enough
        mix = np.array(_orthogonal(normal))
    return signs.astype(np.float32), mix.astype(np.float32)


def _random(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """SplitMix64, written out so that it is the same with every version of NumPy."""
    with np.errstate(over="ignore"):
        word = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = word ^ (word >> np.uint64(31))
    return mixed


@compiled
def _orthogonal(rows):  # type: ignore[no-untyped-def]
    """Gram and Schmidt's, twice over because once rounds too much."""
    count = len(rows)
    for i in range(count):
        for _ in range(2):
            for j in range(i):
                along = 0.0
                for k in range(count):
                    along += rows[i, k] * rows[j, k]
                for k in range(count):
                    rows[i, k] -= along * rows[j, k]
        size = 0.0
        for k in range(count):
            size += rows[i, k] * rows[i, k]
        size = np.sqrt(size)
        for k in range(count):
            rows[i, k] /= size
    return rows


@compiled
def _pairs(source, target):  # type: ignore[no-untyped-def]
    half = source.size // 2
    for w in range(half):
        one, other = source[w], source[w + half]
        target[2 * w] = one + other
        target[2 * w + 1] = one - other


@compiled
def _hadamard(row, room):  # type: ignore[no-untyped-def]
    """A row times the Hadamard matrix, unscaled, in place.

    Every step pairs what lies half a row apart and puts both side by side, so that loops are long. After as many steps
    as the row's size has bits, everything is in its place again.
    """
    left = row.size
    while left >= 4:
        _pairs(row, room)
        _pairs(room, row)
        left //= 4
    if left == 2:
        _pairs(row, room)
        row[:] = room


@compiled
def _turn(row, signs, mix, room):  # type: ignore[no-untyped-def]
    """Rotate a row in place."""
    odd = len(mix)
    block = row.size // odd
    for w in range(row.size):
        row[w] *= signs[w]
    for begin in range(0, row.size, block):
        _hadamard(row[begin : begin + block], room[:block])
    if odd > 1:
        room[:] = row
        row[:] = 0
        for j in range(odd):
            target = row[j * block : (j + 1) * block]
            for k in range(odd):
                source = room[k * block : (k + 1) * block]
                for w in range(block):
                    target[w] += mix[j, k] * source[w]


@compiled
def _turn_back(row, mix, room):  # type: ignore[no-untyped-def]
    """The reverse, but for the signs, in the order of `_turned_back`."""
    odd = len(mix)
    block = row.size // odd
    if odd > 1:
        room[:] = row
        for k in range(odd):
            target = row[k * block : (k + 1) * block]
            for w in range(block):
                target[w] = room[w] * mix[0, k]
            for j in range(1, odd):
                source = room[j * block : (j + 1) * block]
                for w in range(block):
                    target[w] += source[w] * mix[j, k]
    for begin in range(0, row.size, block):
        _hadamard(row[begin : begin + block], room[:block])


@compiled
def _nearest(row, scale, borders, room, found):  # type: ignore[no-untyped-def]
    """How many borders lie below each element of a row, scaled."""
    count = np.zeros(row.size, np.int32)
    for w in range(row.size):
        room[w] = row[w] * scale
    for border in borders:
        for w in range(row.size):
            count[w] += np.int32(room[w] > border)
    for w in range(row.size):
        found[w] = np.uint8(count[w])


@compiled
def _inverse(number):  # type: ignore[no-untyped-def]
    return np.float32(1) / number if number > 1e-37 else np.float32(0)


@compiled
def _in_bytes(row, codes):  # type: ignore[no-untyped-def]
    """A row in steps of the scale that is returned."""
    scale = np.abs(row).max() / np.float32(127)
    inverse = _inverse(scale)
    for w in range(row.size):
        codes[w] = np.int8(np.rint(min(max(row[w] * inverse, np.float32(-127)), np.float32(127))))
    return scale


@compiled
def _encode(values, bits, center, levels, grades, signs, mix, scales, norms, shortest, means, rest, code):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    borders = (levels[1:] + levels[:-1]) * np.float32(0.5)
    between = np.sqrt(grades[1:] * grades[:-1])
    rows = code.size // heads
    code[:] = 0
    mean, room = np.zeros(width, np.float32), np.empty(width, np.float32)
    turned, codes = np.empty((tokens, width), np.float32), np.empty((tokens, width), np.uint8)
    factors = np.empty(tokens, np.float32)
    for h in range(heads):
        if center:
            total = np.zeros(width, np.float64)
            for t in range(tokens):
                for w in range(width):
                    total[w] += values[h, t, w]
            mean[:] = total / tokens
            scales[1, h] = _in_bytes(mean, means[h])
            for w in range(width):
                mean[w] = np.float32(means[h, w]) * scales[1, h]
        least = np.inf
        for t in range(tokens):
            row = turned[t]
            whole, size = 0.0, 0.0  # squared, of the token and of what is left without the means
            for w in range(width):
                row[w] = values[h, t, w] - mean[w]
                whole += np.float64(values[h, t, w]) * np.float64(values[h, t, w])
                size += np.float64(row[w]) * np.float64(row[w])
            if whole < least:
                least = whole
                shortest[h] = t
            norms[h, t] = 0
            if whole < size:
                norms[h, t] = 128
                row[:] = values[h, t]
                size = whole
            _turn(row, signs, mix, room)
            _nearest(row, _inverse(np.float32(np.sqrt(size))), borders, room, codes[t])
            along, squares = 0.0, 0.0
            for w in range(width):
                level = np.float64(levels[codes[t, w]])
                along += level * np.float64(row[w])
                squares += level * level
            factors[t] = max(along / squares, 0.0)
        scales[0, h] = factors.max()
        for t in range(tokens):
            share, grade = factors[t] * _inverse(scales[0, h]), 0
            while grade < between.size and share < between[grade]:
                grade += 1
            norms[h, t] |= np.uint8(grade)
            _nearest(turned[t], _inverse(grades[grade] * scales[0, h]), borders, room, codes[t])
        put_codes(codes, bits, code, h * rows)
        if center:
            t = shortest[h]
            factor = grades[norms[h, t] & 127] * scales[0, h]
            for w in range(width):
                room[w] = turned[t, w] - levels[codes[t, w]] * factor
            scales[2, h] = _in_bytes(room, rest[h])


@compiled
def _decode(code, bits, center, levels, grades, signs, mix, scales, norms, shortest, means, rest, values):  # type: ignore[no-untyped-def]
    heads, tokens, width = values.shape
    rows = code.size // heads
    room, mean = np.empty(width, np.float32), np.empty(width, np.float32)
    for h in range(heads):
        for w in range(width):
            mean[w] = np.float32(means[h, w]) * scales[1, h]
        for t in range(tokens):
            row, norm = values[h, t], norms[h, t]
            unpack_row(code, h * rows, bits, t, row)
            factor = grades[norm & 127] * scales[0, h]
            for w in range(width):
                row[w] = levels[np.uint8(row[w])] * factor
            if center and t == shortest[h]:
                for w in range(width):
                    row[w] += np.float32(rest[h, w]) * scales[2, h]
            _turn_back(row, mix, room)
            kept = np.float32(norm < 128)
            if center:
                for w in range(width):
                    row[w] = row[w] * signs[w] + mean[w] * kept
            else:
                for w in range(width):
                    row[w] *= signs[w]
