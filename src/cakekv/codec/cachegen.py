"""CacheGen: finer steps in early layers, and entropy coding with distributions known in advance (arXiv 2310.07240).

Every token is scaled by its greatest element and rounded to a few steps, as in CacheGen's published code. A channel
that would take nearly all of the steps, as some do on wide heads with normalised keys, is made smaller beforehand.
The steps of a channel are coded by interleaved rANS (arXiv 1402.3392) with one of 64 distributions, which are not sent:
a channel sends its mean, in quarters of a step, which of 16 widths, and how much it was made smaller, two bytes in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from blake3 import blake3

from cakekv.codec.base import Code, Codec, DamagedCode, Plane, Values
from cakekv.codec.kernels import compiled
from cakekv.keys import canonical

STEPS = {1: (31, 15), 2: (15, 7), 3: (7, 5)}
"""By level: steps to either side of zero, in early layers and in the others."""
_BITS = 13
"""Of a probability."""
_SYMBOLS = 128
_WIDTHS = 16
_LEAST = 1 << 16
_LANES = 4
_REACH = 16.0
"""How far a channel may reach, in multiples of the middle channel's RMS. Most models' keys stay within it."""
_FACTORS = (2.0 ** (0.5 * np.arange(16))).astype(np.float32)
"""By which a channel can be made smaller."""


@dataclass(frozen=True)
class CacheGen(Codec):
    """Sizes vary from chunk to chunk.

    Inside the frontier on both models of `docs/codecs.md`: `kvtc` takes fewer bytes at every level and is nearer to
    the exact cache, but has to learn a model first, and decodes many times more slowly.

    Parameters
    ----------
    level : {1, 2, 3}
        1 for the finest steps, 3 for the fewest bytes.
    """

    name: ClassVar[str] = "cachegen"
    version: ClassVar[int] = 2
    fixed: ClassVar[bool] = False
    level: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("level", self.level in STEPS, "1, 2 or 3")

    @cached_property
    def fingerprint(self) -> str:
        """With a digest of the distributions, which both sides must have alike."""
        tables = blake3(_FREQUENCIES.astype("<u2").tobytes()).hexdigest(8)
        return canonical({"base": super().fingerprint, "distributions": tables})

    def steps(self, plane: Plane) -> int:
        """Steps to either side of zero: finer in the first third of the layers for keys, in two layers for values."""
        early = 3 * plane.layer < plane.layers if plane.role == "keys" else plane.layer < 2
        return STEPS[self.level][0 if early else 1]

    def size(self, plane: Plane, part: int = 0) -> int:
        return _head_bytes(plane) + 2 * (plane.elements * _BITS // 16 + 2)

    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        words = np.empty(plane.elements * _BITS // 16 + 2, np.uint16)
        head = _head_bytes(plane)
        begin = _encode(values, self.steps(plane), code[:head], words, _FREQUENCIES, _STARTS, _COSTS, _FACTORS, _REACH)
        body = words[begin:].astype("<u2").view(np.uint8)
        code[head : head + body.size] = body
        return head + int(body.size)

    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        code, head = codes[0], _head_bytes(plane)
        if len(code) < head or (len(code) - head) % 2:
            raise DamagedCode(f"a stream of {len(code)} bytes")
        words = np.frombuffer(code[head:].tobytes(), "<u2").astype(np.uint16)
        if not _decode(code[:head], words, _FREQUENCIES, _STARTS, _LOOKUP, _FACTORS, values):
            raise DamagedCode("a stream that does not end as it should")


def _head_bytes(plane: Plane) -> int:
    """A scale per token; mean, and width and factor, per channel; the coder's last states."""
    return 2 * plane.tokens + 2 * plane.heads * plane.width + 4 * _LANES


def _frequencies() -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    """Of every symbol in 2**13, in each distribution: by quarter of a step and width, a bell with a wider foot."""
    tables = np.empty((4 * _WIDTHS, _SYMBOLS), np.uint16)
    for quarter in range(4):
        for width in range(_WIDTHS):
            sigma = 0.2 * 1.34**width
            edges = [s - _SYMBOLS // 2 - 0.5 - quarter / 4 for s in range(_SYMBOLS + 1)]
            below = [0.94 * math.erf(e / sigma / 1.4142) + 0.06 * math.erf(e / (2.5 * sigma) / 1.4142) for e in edges]
            shares = np.diff(below) / 2
            counts = 1 + np.floor(shares / shares.sum() * ((1 << _BITS) - _SYMBOLS)).astype(np.int64)
            counts[counts.argmax()] += (1 << _BITS) - counts.sum()
            tables[quarter * _WIDTHS + width] = counts
    return tables


_FREQUENCIES = _frequencies()
_STARTS = (np.cumsum(_FREQUENCIES, axis=1, dtype=np.uint32) - _FREQUENCIES).astype(np.uint16)
_COSTS = (_BITS - np.log2(_FREQUENCIES)).astype(np.float32)
_LOOKUP = np.stack([np.repeat(np.arange(_SYMBOLS, dtype=np.uint8), counts) for counts in _FREQUENCIES])


def shrunk(values: Values) -> Values:
    """With channels that reach too far made smaller, as they are rounded."""
    factors = _FACTORS[_shrinking(values, _REACH, _FACTORS)]
    smaller: Values = values / factors.reshape(len(values), 1, -1)
    return smaller


@compiled
def _shrinking(values, reach, factors):  # type: ignore[no-untyped-def]
    """Per channel, the factor (its index) that keeps it within the reach of the middle channel."""
    heads, tokens, width = values.shape
    chosen = np.zeros(heads * width, np.int64)
    most, middle = np.zeros(heads * width), np.zeros(heads * width)
    for h in range(heads):
        for t in range(tokens):
            for w in range(width):
                value = abs(np.float64(values[h, t, w]))
                most[h * width + w] = max(most[h * width + w], value)
                middle[h * width + w] += value * value
    limit = reach * np.sqrt(np.median(middle) / tokens)
    if limit > 0:
        for c in range(heads * width):
            while chosen[c] < factors.size - 1 and most[c] > limit * factors[chosen[c]]:
                chosen[c] += 1
    return chosen


@compiled
def _encode(values, steps, head, words, frequencies, starts, costs, factors, reach):  # type: ignore[no-untyped-def]
    """Fill `head`, and `words` from its end; returns where they begin."""
    heads, tokens, width = values.shape
    shrinking = _shrinking(values, reach, factors)
    smaller = np.float32(1) / factors[shrinking]
    levels = np.empty((heads * width, tokens), np.int32)
    scale = np.empty(1, np.float32)
    bits = scale.view(np.uint32)
    for t in range(tokens):
        most = np.float32(0)
        for h in range(heads):
            for w in range(width):
                most = max(most, abs(values[h, t, w]) * smaller[h * width + w])
        scale[0] = most / np.float32(steps)
        half = bits[0] >> np.uint32(16)
        if (bits[0] & np.uint32(0xFFFF)) != 0:
            half += np.uint32(1)
        head[2 * t], head[2 * t + 1] = np.uint8(half & np.uint32(0xFF)), np.uint8(half >> np.uint32(8))
        bits[0] = half << np.uint32(16)
        inverse = np.float32(1) / scale[0] if scale[0] > 1e-37 else np.float32(0)
        for h in range(heads):
            for w in range(width):
                levels[h * width + w, t] = np.int32(np.rint(values[h, t, w] * smaller[h * width + w] * inverse))
    tables = np.empty(heads * width, np.int64)
    bases = np.empty(heads * width, np.int64)
    for c in range(heads * width):
        total = 0.0
        for t in range(tokens):
            total += levels[c, t]
        quarters = int(np.rint(4 * total / tokens))
        square = 0.0
        for t in range(tokens):
            square += (levels[c, t] - 0.25 * quarters) ** 2
        guess = np.log(max(np.sqrt(square / tokens), 0.2) / 0.2) / np.log(1.34)
        base = quarters >> 2
        best, best_cost = 0, np.inf
        for candidate in range(max(0, int(guess) - 1), min(16, int(guess) + 3)):
            table = (quarters & 3) * 16 + candidate
            cost = 0.0
            for t in range(tokens):
                cost += costs[table, levels[c, t] - base + 64]
            if cost < best_cost:
                best, best_cost = candidate, cost
        tables[c], bases[c] = (quarters & 3) * 16 + best, base
        head[2 * tokens + 2 * c] = np.uint8(quarters & 0xFF)
        head[2 * tokens + 2 * c + 1] = np.uint8(best | shrinking[c] << 4)
    states = np.full(4, 1 << 16, np.uint64)
    at = words.size
    for c in range(heads * width - 1, -1, -1):
        table, base = tables[c], bases[c]
        for t in range(tokens - 1, -1, -1):
            symbol = levels[c, t] - base + 64
            frequency = np.uint64(frequencies[table, symbol])
            state = states[t & 3]
            if state >= (frequency << np.uint64(19)):
                at -= 1
                words[at] = np.uint16(state & np.uint64(0xFFFF))
                state >>= np.uint64(16)
            states[t & 3] = (
                ((state // frequency) << np.uint64(13)) + state % frequency + np.uint64(starts[table, symbol])
            )
    place = 2 * tokens + 2 * heads * width
    for lane in range(4):
        for byte in range(4):
            head[place + 4 * lane + byte] = np.uint8((states[lane] >> np.uint64(8 * byte)) & np.uint64(0xFF))
    return at


@compiled
def _decode(head, words, frequencies, starts, lookup, factors, values):  # type: ignore[no-untyped-def]
    """The reverse of `_encode`; whether the stream ended as it began. Any content will do."""
    heads, tokens, width = values.shape
    scales = np.empty(tokens, np.float32)
    bits = scales.view(np.uint32)
    for t in range(tokens):
        bits[t] = (np.uint32(head[2 * t]) | (np.uint32(head[2 * t + 1]) << np.uint32(8))) << np.uint32(16)
    place = 2 * tokens + 2 * heads * width
    states = np.zeros(4, np.uint32)
    for lane in range(4):
        for byte in range(4):
            states[lane] |= np.uint32(head[place + 4 * lane + byte]) << np.uint32(8 * byte)
    levels = np.empty((width, tokens), np.float32)
    larger = np.empty(width, np.float32)
    mask, least = np.uint32((1 << 13) - 1), np.uint32(1 << 16)
    at, end = 0, words.size
    for h in range(heads):
        for w in range(width):
            where = 2 * tokens + 2 * (h * width + w)
            quarters = np.int64(np.int8(head[where]))
            table = (quarters & 3) * 16 + np.int64(head[where + 1] & 15)
            larger[w] = factors[head[where + 1] >> 4]
            base = (quarters >> 2) - 64
            symbols, counts, below = lookup[table], frequencies[table], starts[table]
            for t in range(tokens):
                state = states[t & 3]
                slot = state & mask
                symbol = symbols[slot]
                state = np.uint32(counts[symbol]) * (state >> np.uint32(13)) + slot - np.uint32(below[symbol])
                if state < least:
                    if at == end:
                        return False
                    state = (state << np.uint32(16)) | np.uint32(words[at])
                    at += 1
                states[t & 3] = state
                levels[w, t] = np.float32(np.int64(symbol) + base)
        for t in range(tokens):
            for w in range(width):
                values[h, t, w] = levels[w, t] * scales[t] * larger[w]
    for lane in range(4):
        if states[lane] != least:
            return False
    return at == end
