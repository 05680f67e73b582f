"""The codecs' inner loops, compiled by numba, which releases the interpreter lock while they run.

Codes of fewer than 8 bits lie side by side along the tokens: a byte holds the same channel of 2, 4 or 8 neighbouring
tokens, so that the loop over a row's channels does one thing to consecutive bytes. Three and five bits are two or four,
and one more, in rows of their own. Scales and lows are bfloat16; lows are rounded down and scales up, so that all
elements are within reach.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cakekv.errors import BadInput

try:
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError as error:
    raise BadInput("codecs need numba, which is not installed: pip install 'cakekv[codecs]'") from error

compiled: Any = njit(nogil=True, cache=True)
_of_finite: Any = njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
"""So that searches for the least and the greatest element run on whole registers."""


@compiled
def widen_bfloat16(source, target):  # type: ignore[no-untyped-def]
    """(n,) uint16 to (n,) float32"""
    bits = target.view(np.uint32)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@compiled
def narrow_bfloat16(source, target):  # type: ignore[no-untyped-def]
    """(n,) float32 to (n,) uint16, to the nearest, ties to even; the elements are finite."""
    bits = source.view(np.uint32)
    for i in range(bits.size):
        word = bits[i]
        target[i] = np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


PACKED_BITS = (2, 3, 4, 5, 8)
"""How long codes can be. Others do not fill bytes side by side, and `put_codes` would write beyond a plane's code."""


def groups_of(per_channel: bool, group: int, heads: int, tokens: int, width: int) -> int:
    """How many scales a plane has."""
    return heads * -(-tokens // group) * width if per_channel else heads * tokens * -(-width // group)


def rows_of(bits: int, tokens: int) -> int:
    """Rows of `width` bytes that a head's codes take."""
    return (tokens + 7) // 8 * bits if bits % 2 else (tokens * bits + 7) // 8


_rows_of: Any = compiled(rows_of)


def affine_bytes(bits: int, per_channel: bool, group: int, heads: int, tokens: int, width: int) -> int:
    """Bytes of a plane quantised by `quantise`. Raises `ValueError` if codes of so many bits cannot be packed."""
    if bits not in PACKED_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed: only of {', '.join(map(str, PACKED_BITS))}")
    return 4 * groups_of(per_channel, group, heads, tokens, width) + heads * rows_of(bits, tokens) * width


@compiled
def _round_down(source, target):  # type: ignore[no-untyped-def]
    """float32 to the bfloat16 at or below it, in place as float32 too."""
    bits = source.view(np.uint32)
    for i in range(source.size):
        word = bits[i]
        half = word >> np.uint32(16)
        if (word & np.uint32(0xFFFF)) != 0 and (word >> np.uint32(31)) != 0:
            half += np.uint32(1)
        target[i] = half
        bits[i] = half << np.uint32(16)


@compiled
def round_up(source, target):  # type: ignore[no-untyped-def]
    """Positive float32 to the bfloat16 at or above it, in place as float32 too."""
    bits = source.view(np.uint32)
    for i in range(source.size):
        word = bits[i]
        half = word >> np.uint32(16)
        if (word & np.uint32(0xFFFF)) != 0:
            half += np.uint32(1)
        target[i] = half
        bits[i] = half << np.uint32(16)


@compiled
def put_row(code, at, row):  # type: ignore[no-untyped-def]
    for i in range(row.size):
        code[at + 2 * i] = np.uint8(row[i] & np.uint32(0xFF))
        code[at + 2 * i + 1] = np.uint8(row[i] >> np.uint32(8))


@compiled
def get_row(code, at, row):  # type: ignore[no-untyped-def]
    """Scales, or lows, from `at` on, as float32."""
    bits = row.view(np.uint32)
    for i in range(row.size):
        bits[i] = (np.uint32(code[at + 2 * i]) | (np.uint32(code[at + 2 * i + 1]) << np.uint32(8))) << np.uint32(16)


@compiled
def _spread(few, group, row):  # type: ignore[no-untyped-def]
    """Each of `few` to the next `group` of `row`."""
    for g in range(few.size):
        one = few[g]
        for w in range(g * group, min((g + 1) * group, row.size)):
            row[w] = one


@compiled
def put_codes(codes, bits, code, at):  # type: ignore[no-untyped-def]
    """Pack one head's codes (tokens, width), which were zeroed beyond the last token, at `at`."""
    tokens, width = codes.shape
    for t in range(tokens):
        if bits % 2:
            low, e = bits - 1, t % 8
            per_byte = 8 // low
            first = at + (t // 8 * bits + e // per_byte) * width
            second = at + (t // 8 * bits + low) * width
            for w in range(width):
                code[first + w] |= np.uint8((codes[t, w] & ((1 << low) - 1)) << (low * (e % per_byte)))
                code[second + w] |= np.uint8((codes[t, w] >> low) << e)
        else:
            per_byte = 8 // bits
            first = at + t // per_byte * width
            shift = bits * (t % per_byte)
            for w in range(width):
                code[first + w] |= np.uint8(codes[t, w] << shift)


@compiled
def pack3(codes, code):  # type: ignore[no-untyped-def]
    """Pack (heads, tokens, width) codes of three bits."""
    heads, tokens, width = codes.shape
    code[:] = 0
    for h in range(heads):
        put_codes(codes[h], 3, code, h * _rows_of(3, tokens) * width)


@compiled
def turn(values, cosine, sine, interleaved):  # type: ignore[no-untyped-def]
    """Turn pairs of elements of (heads, tokens, width) in place by angles whose cosines are (tokens, pairs)."""
    heads, tokens, _ = values.shape
    pairs = cosine.shape[1]
    for h in range(heads):
        for t in range(tokens):
            row, first, second = values[h, t], values[h, t, :pairs], values[h, t, pairs : 2 * pairs]
            if interleaved:
                for p in range(pairs):
                    one, other = row[2 * p], row[2 * p + 1]
                    row[2 * p] = one * cosine[t, p] - other * sine[t, p]
                    row[2 * p + 1] = other * cosine[t, p] + one * sine[t, p]
            else:
                for p in range(pairs):
                    one, other = first[p], second[p]
                    first[p] = one * cosine[t, p] - other * sine[t, p]
                    second[p] = other * cosine[t, p] + one * sine[t, p]


@_of_finite
def quantise(values, bits, per_channel, group, code):  # type: ignore[no-untyped-def]
    """Quantise (heads, tokens, width) evenly between each group's least and greatest element.

    A group is `group` tokens of a channel, or `group` channels of a token; the last of a head may be smaller. `code`
    gets all scales, all lows, then the packed codes.
    """
    heads, tokens, width = values.shape
    levels = np.float32((1 << bits) - 1)
    across = width if per_channel else (width + group - 1) // group
    groups = (tokens + group - 1) // group if per_channel else tokens
    step = group if per_channel else 1
    scales_at, lows_at = 0, 2 * heads * groups * across
    codes_at = 2 * lows_at
    rows = _rows_of(bits, tokens)
    code[codes_at:] = 0
    least, most = np.empty(across, np.float32), np.empty(across, np.float32)
    half = np.empty(across, np.uint32)
    low_row, inverse_row = np.empty(width, np.float32), np.empty(width, np.float32)
    codes = np.empty((tokens, width), np.uint8)
    for h in range(heads):
        for g in range(groups):
            begin, end = g * step, min((g + 1) * step, tokens)
            if per_channel:
                least[:] = values[h, begin]
                most[:] = values[h, begin]
                for t in range(begin + 1, end):
                    for w in range(width):
                        least[w] = min(least[w], values[h, t, w])
                        most[w] = max(most[w], values[h, t, w])
            else:
                for a in range(across):
                    least[a] = values[h, begin, a * group]
                    most[a] = least[a]
                    for w in range(a * group + 1, min((a + 1) * group, width)):
                        least[a] = min(least[a], values[h, begin, w])
                        most[a] = max(most[a], values[h, begin, w])
            _round_down(least, half)
            put_row(code, lows_at + 2 * (h * groups + g) * across, half)
            for a in range(across):
                most[a] = (most[a] - least[a]) / levels
            round_up(most, half)
            put_row(code, scales_at + 2 * (h * groups + g) * across, half)
            for a in range(across):
                most[a] = np.float32(1) / most[a] if most[a] > 1e-37 else np.float32(0)
            if per_channel:
                low_row[:] = least
                inverse_row[:] = most
            else:
                _spread(least, group, low_row)
                _spread(most, group, inverse_row)
            for t in range(begin, end):
                for w in range(width):
                    level = (values[h, t, w] - low_row[w]) * inverse_row[w] + np.float32(0.5)
                    codes[t, w] = np.uint8(min(level, levels))
        put_codes(codes, bits, code, codes_at + h * rows * width)


@compiled
def unpack_row(code, at, bits, t, row):  # type: ignore[no-untyped-def]
    """The codes of token `t` of the head whose rows begin at `at`, as float32."""
    width = row.size
    if bits == 8:
        source = code[at + t * width : at + (t + 1) * width]
        for w in range(width):
            row[w] = source[w]
    elif bits % 2:
        per_byte = 8 // (bits - 1)
        first = at + (t // 8 * bits + t % 8 // per_byte) * width
        second = at + (t // 8 * bits + bits - 1) * width
        source, other = code[first : first + width], code[second : second + width]
        low, bit = np.uint8(bits - 1), np.uint8(t % 8)
        shift, mask = np.uint8((bits - 1) * (t % per_byte)), np.uint8((1 << (bits - 1)) - 1)
        for w in range(width):
            row[w] = ((source[w] >> shift) & mask) | (((other[w] >> bit) & np.uint8(1)) << low)
    else:
        per_byte = 8 // bits
        first = at + t // per_byte * width
        source = code[first : first + width]
        shift, mask = np.uint8(bits * (t % per_byte)), np.uint8((1 << bits) - 1)
        for w in range(width):
            row[w] = (source[w] >> shift) & mask


@compiled
def dequantise(code, bits, per_channel, group, values):  # type: ignore[no-untyped-def]
    """The reverse of `quantise`. `code` must have the length of `affine_bytes`; any content will do."""
    heads, tokens, width = values.shape
    across = width if per_channel else (width + group - 1) // group
    groups = (tokens + group - 1) // group if per_channel else tokens
    lows_at = 2 * heads * groups * across
    rows = _rows_of(bits, tokens)
    scales, lows = np.empty((groups, across), np.float32), np.empty((groups, across), np.float32)
    for h in range(heads):
        at = 2 * h * groups * across
        get_row(code, at, scales.reshape(-1))
        get_row(code, lows_at + at, lows.reshape(-1))
        for t in range(tokens):
            row = values[h, t]
            unpack_row(code, 2 * lows_at + h * rows * width, bits, t, row)
            if per_channel:
                scale, low = scales[t // group], lows[t // group]
                for w in range(width):
                    row[w] = row[w] * scale[w] + low[w]
            else:
                for a in range(across):
                    one_scale, one_low = scales[t, a], lows[t, a]
                    for w in range(a * group, min((a + 1) * group, width)):
                        row[w] = row[w] * one_scale + one_low


@intrinsic
def load_word(context, array, at):  # type: ignore[no-untyped-def]
    """Eight bytes from anywhere, as a number whose highest bits are the first byte."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        return builder.bswap(builder.load(place, align=1))

    return types.uint64(array, types.int64), build


@intrinsic
def store_word(context, array, at, word):  # type: ignore[no-untyped-def]
    """Write what `load_word` reads."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(builder.bswap(arguments[2]), place, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), build
