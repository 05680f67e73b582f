"""The same bits in fewer bytes: exponents are entropy coded, signs and mantissas are stored as they are.

Neighbouring keys and values differ in size by a few powers of two, so their exponents hold about 2.6 bits of 8. A
segment is coded without a word about its layout or its dtype: whichever of bfloat16, float16 and float32 makes it
smallest is taken for its elements, and a segment that none makes smaller is kept as it is.

A segment is cut into an even number of blocks of equal size, so that keys and values, where both are equally long, fall
into different ones. Each block has a Huffman code of its own for 15 exponents in a row and for all others together
(the escape), with words of at most `LONGEST` bits, so that one look into a table finds two symbols. Four lanes are
decoded side by side, which keeps a CPU core busy. It does not suit a GPU's threads, for which each lane would have to
be hundreds of times shorter: packed segments are decoded on CPU cores.

    packed   0   form: 0 kept, 1 bfloat16, 2 float16, 3 float32; a kept segment's bytes follow
             1   bytes of the segment                                                                7 bytes
             8   blocks of n elements, n a multiple of 64; then what is left of the segment, as it is
    block    0   lengths of the 16 symbols' words, the lower half of a byte first; all 0: no code   8 bytes
             8   bytes of the four lanes                                                             4 x 2 bytes
             16  escapes                                                                             2 bytes
             18  the exponent that symbol 0 stands for                                               2 bytes
             20  signs and mantissas, the lanes, the escaped exponents

A lane holds a quarter of the symbols, two and two: that of element i before that of element i + n/2, for i from 0 to
n/2; its words' bits fill each byte from the highest on. Escaped exponents come in the same order. Numbers are
little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cakekv.codec.base import DamagedCode
from cakekv.codec.kernels import compiled, load_word, store_word

LONGEST = 7
"""Bits of a word. Two words index a table of 2^14 entries."""
UNIT = 64
"""Elements that a block's length is a multiple of."""
BLOCK = 16_384
"""Elements of the longest block."""
HEAD, BLOCK_HEAD = 8, 20
KEPT, BFLOAT16, FLOAT16, FLOAT32 = range(4)
SAMPLE = 4096
"""Elements by which a form is chosen."""
_SYMBOLS = 16
_ESCAPE = _SYMBOLS - 1
_LANE_ROOM = BLOCK // 4 * LONGEST // 8 + 16
"""Bytes that a lane can be read up to, whatever its bits are."""


def bound(size: int) -> int:
    """The most bytes that `pack` uses for a segment of `size` bytes."""
    return size + 1


def pack(segment: memoryview, packed: memoryview) -> int:
    """Write a segment in fewer bytes, if that can be.

    Parameters
    ----------
    segment : memoryview
        Any bytes.
    packed : memoryview
        Room for them, at least `bound(len(segment))` bytes.

    Returns
    -------
    int
        How many bytes of `packed` are used.
    """
    source, target = _read(segment), np.frombuffer(packed, np.uint8)
    if target.size < bound(source.size):
        raise ValueError(f"{source.size} bytes need room for {bound(source.size)}, not {target.size}")
    return int(_pack(source, target, _form_of(source)))


def unpacked_size(packed: memoryview) -> int:
    """Bytes of the segment, at most twice those of `packed`. Raises `DamagedCode`."""
    size = int(_size(_read(packed)))
    if size < 0:
        raise DamagedCode
    return size


def unpack(packed: memoryview, segment: memoryview) -> None:
    """Fill `segment` with what `pack` was given.

    Parameters
    ----------
    packed : memoryview
        What `pack` wrote, and nothing behind it.
    segment : memoryview
        `unpacked_size(packed)` bytes.

    Raises
    ------
    DamagedCode
        These are no bytes that `pack` writes, or those of a segment of another size.
    """
    if not _unpack(_read(packed), np.frombuffer(segment, np.uint8)):
        raise DamagedCode


def _read(view: memoryview) -> Any:
    """The bytes as an array that cannot be written: one type for numba, so that it compiles a function once."""
    array = np.frombuffer(view, np.uint8)
    array.flags.writeable = False
    return array


# Codes ---------------------------------------------------------------------------------------------------------------
@compiled
def _code_lengths(counts, lengths):  # type: ignore[no-untyped-def]
    """Find the lengths of the best code of at most `LONGEST` bits: package-merge (Larmore and Hirschberg, 1990).

    A code has at least two words, so that it is complete. Returns how many bits all symbols take.
    """
    order = np.empty(_SYMBOLS, np.int64)
    found = 0
    for s in range(_SYMBOLS):
        lengths[s] = 0
        if counts[s] > 0:
            at = found
            while at > 0 and counts[order[at - 1]] > counts[s]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = s
            found += 1
    if found == 1:
        lengths[order[0]] = lengths[(order[0] + 1) % _SYMBOLS] = 1
        return counts[order[0]]
    weights = np.empty((LONGEST, 2 * _SYMBOLS), np.int64)
    members = np.empty((LONGEST, 2 * _SYMBOLS), np.int64)  # a symbol, or -1 for a pair of the row before
    sizes = np.zeros(LONGEST, np.int64)
    for row in range(LONGEST):
        pairs = sizes[row - 1] // 2 if row else 0
        one, pair, size = 0, 0, 0
        while one < found or pair < pairs:
            weight = weights[row - 1, 2 * pair] + weights[row - 1, 2 * pair + 1] if pair < pairs else np.int64(1) << 62
            if one < found and counts[order[one]] <= weight:
                weights[row, size] = counts[order[one]]
                members[row, size] = order[one]
                one += 1
            else:
                weights[row, size] = weight
                members[row, size] = -1
                pair += 1
            size += 1
        sizes[row] = size
    take = 2 * found - 2
    for row in range(LONGEST - 1, -1, -1):
        pairs = 0
        for k in range(take):
            if members[row, k] >= 0:
                lengths[members[row, k]] += 1
            else:
                pairs += 1
        take = 2 * pairs
    total = 0
    for s in range(_SYMBOLS):
        total += counts[s] * lengths[s]
    return total


@compiled
def _in_order(lengths, order):  # type: ignore[no-untyped-def]
    """Sort the symbols that have a word by its length. Returns how many; 0: the lengths are not those of a code."""
    found, covered = 0, 0
    for length in range(1, LONGEST + 1):
        for s in range(_SYMBOLS):
            if lengths[s] == length:
                order[found] = s
                found += 1
                covered += 1 << (LONGEST - length)
    for s in range(_SYMBOLS):
        if lengths[s] > LONGEST:
            return 0
    return found if covered == 1 << LONGEST else 0


@compiled
def _choose(counts, lengths):  # type: ignore[no-untyped-def]
    """Choose a code by how often each exponent is seen.

    Returns the exponent of symbol 0, how many exponents are escaped, and how many bits everything takes. No lengths: no
    code pays.
    """
    total = 0
    for e in range(256):
        total += counts[e]
    first, inside, most = 0, 0, 0
    for e in range(256):
        inside += counts[e]
        if e >= _ESCAPE:
            inside -= counts[e - _ESCAPE]
        if inside > most:
            most = inside
            first = max(e - _ESCAPE + 1, 0)
    seen = np.zeros(_SYMBOLS, np.int64)
    for s in range(_ESCAPE):
        seen[s] = counts[first + s]
    seen[_ESCAPE] = total - most
    bits = _code_lengths(seen, lengths) + 8 * (total - most)
    if bits >= 8 * total:
        lengths[:] = 0
        return 0, total, 8 * total
    return first, total - most, bits


# Signs and mantissas --------------------------------------------------------------------------------------------------
@compiled
def _rest_bytes(form, n):  # type: ignore[no-untyped-def]
    """Bytes of the signs and mantissas of n elements."""
    if form == BFLOAT16:
        return n
    return n // 8 * 11 if form == FLOAT16 else 3 * n


@compiled
def _split_bfloat16(x, exponents, rest):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        exponents[i] = np.uint8((x[i] >> np.uint16(7)) & np.uint16(0xFF))
        rest[i] = np.uint8(((x[i] >> np.uint16(8)) & np.uint16(0x80)) | (x[i] & np.uint16(0x7F)))


@compiled
def _split_float16(x, exponents, rest):  # type: ignore[no-untyped-def]
    """Low bytes; then the two bits above them, of four elements in a byte; then signs, of eight."""
    n = x.size
    quarter, eighth = n // 4, n // 8
    for i in range(n):
        exponents[i] = np.uint8((x[i] >> np.uint16(10)) & np.uint16(0x1F))
        rest[i] = np.uint8(x[i] & np.uint16(0xFF))
    twos, signs = rest[n : n + quarter], rest[n + quarter :]
    for i in range(quarter):
        bits = (x[i] >> np.uint16(8)) & np.uint16(3)
        bits |= (x[i + quarter] >> np.uint16(6)) & np.uint16(0xC)
        bits |= (x[i + 2 * quarter] >> np.uint16(4)) & np.uint16(0x30)
        bits |= (x[i + 3 * quarter] >> np.uint16(2)) & np.uint16(0xC0)
        twos[i] = np.uint8(bits)
    signs[:] = np.uint8(0)
    for k in range(8):
        part = x[k * eighth : (k + 1) * eighth]
        for i in range(eighth):
            signs[i] |= np.uint8((part[i] >> np.uint16(15)) << np.uint16(k))


@compiled
def _split_float32(x, exponents, rest):  # type: ignore[no-untyped-def]
    """The lower two bytes; then the others."""
    n = x.size
    low, high = rest[: 2 * n].view(np.uint16), rest[2 * n :]
    for i in range(n):
        exponents[i] = np.uint8((x[i] >> np.uint32(23)) & np.uint32(0xFF))
        low[i] = np.uint16(x[i] & np.uint32(0xFFFF))
        high[i] = np.uint8(((x[i] >> np.uint32(24)) & np.uint32(0x80)) | ((x[i] >> np.uint32(16)) & np.uint32(0x7F)))


@compiled
def _join_bfloat16(pairs, first, rest, x):  # type: ignore[no-untyped-def]
    half = pairs.size
    for part in range(2):
        shift = np.uint8(4 * part)
        out, one = x[part * half : (part + 1) * half], rest[part * half : (part + 1) * half]
        for i in range(half):
            e = np.uint16(np.uint8(((pairs[i] >> shift) & np.uint8(15)) + first))
            r = np.uint16(one[i])
            out[i] = ((r & np.uint16(0x80)) << np.uint16(8)) | (e << np.uint16(7)) | (r & np.uint16(0x7F))


@compiled
def _join_float16(pairs, first, rest, x):  # type: ignore[no-untyped-def]
    half, n = pairs.size, x.size
    quarter, eighth = n // 4, n // 8
    twos, signs = rest[n : n + quarter], rest[n + quarter :]
    for part in range(8):
        begin = part * eighth
        shift, two, sign = np.uint8(part // 4 * 4), np.uint8(part // 2 * 2), np.uint8(part)
        out, low = x[begin : begin + eighth], rest[begin : begin + eighth]
        ours, bits = pairs[begin % half : begin % half + eighth], twos[begin % quarter : begin % quarter + eighth]
        for i in range(eighth):
            e = np.uint16(((ours[i] >> shift) & np.uint8(15)) + first) & np.uint16(0x1F)
            high = ((signs[i] >> sign) & np.uint8(1)) << np.uint8(7) | ((bits[i] >> two) & np.uint8(3))
            out[i] = (np.uint16(high) << np.uint16(8)) | (e << np.uint16(10)) | np.uint16(low[i])


@compiled
def _join_float32(pairs, first, rest, x):  # type: ignore[no-untyped-def]
    half, n = pairs.size, x.size
    low, high = rest[: 2 * n].view(np.uint16), rest[2 * n :]
    for part in range(2):
        shift, begin = np.uint8(4 * part), part * half
        for i in range(half):
            e = np.uint32(np.uint8(((pairs[i] >> shift) & np.uint8(15)) + first))
            r = np.uint32(high[begin + i])
            x[begin + i] = (
                ((r & np.uint32(0x80)) << np.uint32(24))
                | (e << np.uint32(23))
                | ((r & np.uint32(0x7F)) << np.uint32(16))
                | np.uint32(low[begin + i])
            )


# Packing --------------------------------------------------------------------------------------------------------------
@compiled
def _count(exponents, counts):  # type: ignore[no-untyped-def]
    """How often each exponent is there, a multiple of four of them; four counts each, which do not wait for another."""
    parts = np.zeros((4, 256), np.uint32)
    for i in range(0, exponents.size, 4):
        parts[0, exponents[i]] += np.uint32(1)
        parts[1, exponents[i + 1]] += np.uint32(1)
        parts[2, exponents[i + 2]] += np.uint32(1)
        parts[3, exponents[i + 3]] += np.uint32(1)
    for e in range(256):
        counts[e] = parts[0, e] + parts[1, e] + parts[2, e] + parts[3, e]


@compiled
def _form_of(source):  # type: ignore[no-untyped-def]
    """By a sample: the form that makes a segment smallest."""
    counts = np.zeros((4, 256), np.int64)
    words = source[: source.size // 4 * 4].view(np.uint32)
    step = 2 * words.size // SAMPLE | 1  # odd, so that it meets all channels
    seen = 0
    for i in range(0, words.size, step):
        word = words[i]
        counts[FLOAT32, (word >> np.uint32(23)) & np.uint32(0xFF)] += 1
        counts[BFLOAT16, (word >> np.uint32(23)) & np.uint32(0xFF)] += 1
        counts[BFLOAT16, (word >> np.uint32(7)) & np.uint32(0xFF)] += 1
        counts[FLOAT16, (word >> np.uint32(26)) & np.uint32(0x1F)] += 1
        counts[FLOAT16, (word >> np.uint32(10)) & np.uint32(0x1F)] += 1
        seen += 1
    lengths = np.empty(_SYMBOLS, np.int64)
    best, least = KEPT, 32 * seen
    for form, rest in ((BFLOAT16, 16), (FLOAT16, 22), (FLOAT32, 24)):
        bits = rest * seen + _choose(counts[form], lengths)[2]
        if bits < least:
            best, least = form, bits
    return best


@compiled
def _put(target, at, number, size):  # type: ignore[no-untyped-def]
    for k in range(size):
        target[at + k] = np.uint8((number >> (8 * k)) & 0xFF)


@compiled
def _get(source, at, size):  # type: ignore[no-untyped-def]
    number = np.int64(0)
    for k in range(size):
        number |= np.int64(source[at + k]) << (8 * k)
    return number


@compiled
def _put_lane(pairs, words, out, at):  # type: ignore[no-untyped-def]
    """Code a multiple of four pairs; writes up to eight bytes beyond. Returns where the lane ends."""
    held, waiting = np.uint64(0), np.uint64(0)
    low, full = np.uint64(0xFF), np.uint64(64)
    for i in range(0, pairs.size, 4):
        a, b = words[pairs[i]], words[pairs[i + 1]]
        c, d = words[pairs[i + 2]], words[pairs[i + 3]]
        two = ((a >> np.uint64(8)) << (b & low)) | (b >> np.uint64(8))
        more = ((c >> np.uint64(8)) << (d & low)) | (d >> np.uint64(8))
        behind = (c & low) + (d & low)
        bits = (a & low) + (b & low) + behind
        held = (held << bits) | (two << behind) | more
        waiting += bits
        store_word(out, at, held << ((full - waiting) & np.uint64(63)))
        at += np.int64(waiting >> np.uint64(3))
        waiting &= np.uint64(7)
    return at + 1 if waiting else at


@compiled
def _pack_block(exponents, pairs, lengths, first, escapes, target, at):  # type: ignore[no-untyped-def]
    """Write a block's lanes and escapes, from `at` on. Returns where it ends, and how long the lanes are."""
    half = pairs.size
    most = np.uint8(_ESCAPE)
    for i in range(half):
        a = min(np.uint8(exponents[i] - first), most)
        b = min(np.uint8(exponents[half + i] - first), most)
        pairs[i] = a | (b << np.uint8(4))
    order = np.empty(_SYMBOLS, np.int64)
    found = _in_order(lengths, order)
    word_of = np.zeros(_SYMBOLS, np.uint64)
    begin = 0
    for k in range(found):
        rest = LONGEST - lengths[order[k]]
        word_of[order[k]] = np.uint64(begin >> rest)
        begin += 1 << rest
    words = np.empty(256, np.uint64)
    for one in range(_SYMBOLS):
        for two in range(_SYMBOLS):
            bits = (word_of[one] << np.uint64(lengths[two])) | word_of[two]
            words[two * _SYMBOLS + one] = (bits << np.uint64(8)) | np.uint64(lengths[one] + lengths[two])
    quarter = half // 4 if found else 0
    ends = np.empty(4, np.int64)
    if not found:
        pairs[:] = np.uint8(0xFF)
    for lane in range(4):
        at = _put_lane(pairs[lane * quarter : (lane + 1) * quarter], words, target, at)
        ends[lane] = at
    if escapes:
        for i in range(half):
            if pairs[i] & np.uint8(15) == most:
                target[at] = exponents[i]
                at += 1
            if pairs[i] >> np.uint8(4) == most:
                target[at] = exponents[half + i]
                at += 1
    return at, ends


@compiled
def _blocks_of(units):  # type: ignore[no-untyped-def]
    """Into how many blocks so many units are cut."""
    return 2 * -(-units // (2 * (BLOCK // UNIT)))


@compiled
def _pack(source, target, form):  # type: ignore[no-untyped-def]
    """Returns how many bytes of the target are used."""
    size = source.size
    width = 4 if form == FLOAT32 else 2
    units = size // (UNIT * width)
    blocks = _blocks_of(units)
    exponents, pairs = np.empty(BLOCK, np.uint8), np.empty(BLOCK // 2, np.uint8)
    counts, lengths = np.empty(256, np.int64), np.empty(_SYMBOLS, np.int64)
    at = HEAD
    done = 0
    for block in range(blocks if form != KEPT else 0):
        n = (units * (block + 1) // blocks - units * block // blocks) * UNIT
        end = done + n * width
        part = source[done:end]
        rest_bytes = _rest_bytes(form, n)
        head, at = at, at + BLOCK_HEAD
        if at + rest_bytes > size:
            form = KEPT
            break
        rest, ours = target[at : at + rest_bytes], exponents[:n]
        if form == BFLOAT16:
            _split_bfloat16(part.view(np.uint16), ours, rest)
        elif form == FLOAT16:
            _split_float16(part.view(np.uint16), ours, rest)
        else:
            _split_float32(part.view(np.uint32), ours, rest)
        at += rest_bytes
        _count(ours, counts)
        first, escapes, bits = _choose(counts, lengths)
        if at + bits // 8 + 16 > size:  # the lanes end within a byte each, and write eight beyond
            form = KEPT
            break
        target[head : head + BLOCK_HEAD] = np.uint8(0)
        begin = at
        at, ends = _pack_block(ours, pairs[: n // 2], lengths, np.uint8(first), escapes, target, at)
        for s in range(_SYMBOLS):
            target[head + s // 2] |= np.uint8(lengths[s] << (4 * (s % 2)))
        for lane in range(4):
            _put(target, head + 8 + 2 * lane, ends[lane] - begin, 2)
            begin = ends[lane]
        target[head + 18] = np.uint8(first)
        _put(target, head + 16, escapes, 2)
        done = end
    left = size - done
    if form == KEPT or at + left > size:
        target[0] = KEPT
        target[1 : size + 1] = source
        return size + 1
    target[0] = form
    _put(target, 1, size, 7)
    target[at : at + left] = source[done:]
    return at + left


# Unpacking ------------------------------------------------------------------------------------------------------------
@compiled
def _fill_table(lengths, order, found, table):  # type: ignore[no-untyped-def]
    """By the next `2 * LONGEST` bits: how many of them two words take, and above these eight bits the two symbols."""
    at = 0
    for j in range(found):
        a = order[j]
        for k in range(found):
            b = order[k]
            bits = lengths[a] + lengths[b]
            entry = np.uint16(bits | (a << 8) | (b << 12))
            end = at + (1 << (2 * LONGEST - bits))
            table[at:end] = entry
            at = end


@compiled
def _get_lanes(lanes, table, pairs, used):  # type: ignore[no-untyped-def]
    """Decode a quarter of the pairs from each of four lanes, `_LANE_ROOM` bytes apart; `used`: bits of each."""
    quarter = pairs.size // 4
    out0, out1 = pairs[:quarter], pairs[quarter : 2 * quarter]
    out2, out3 = pairs[2 * quarter : 3 * quarter], pairs[3 * quarter :]
    p0, p1, p2, p3 = np.int64(0), np.int64(8 * _LANE_ROOM), np.int64(16 * _LANE_ROOM), np.int64(24 * _LANE_ROOM)
    for i in range(0, quarter, 4):
        p0 += _get_four(lanes, p0, table, out0, i)
        p1 += _get_four(lanes, p1, table, out1, i)
        p2 += _get_four(lanes, p2, table, out2, i)
        p3 += _get_four(lanes, p3, table, out3, i)
    used[0], used[1], used[2], used[3] = p0, p1 - 8 * _LANE_ROOM, p2 - 16 * _LANE_ROOM, p3 - 24 * _LANE_ROOM


@compiled
def _get_four(lanes, at, table, out, i):  # type: ignore[no-untyped-def]
    shift, six, eight = np.uint64(64 - 2 * LONGEST), np.uint64(63), np.uint64(8)
    word = load_word(lanes, at >> 3) << np.uint64(at & 7)
    a = np.uint64(table[word >> shift])
    word <<= a & six
    b = np.uint64(table[word >> shift])
    word <<= b & six
    c = np.uint64(table[word >> shift])
    word <<= c & six
    d = np.uint64(table[word >> shift])
    out[i] = np.uint8(a >> eight)
    out[i + 1] = np.uint8(b >> eight)
    out[i + 2] = np.uint8(c >> eight)
    out[i + 3] = np.uint8(d >> eight)
    return np.int64((a + b + c + d) & np.uint64(0xFF))


@compiled
def _size(packed):  # type: ignore[no-untyped-def]
    """Bytes of the segment; -1 if the code is damaged."""
    if packed.size == 0 or packed[0] > FLOAT32:
        return -1
    if packed[0] == KEPT:
        return packed.size - 1
    if packed.size < HEAD:
        return -1
    size = _get(packed, 1, 7)
    return size if size < 2 * packed.size else -1


@compiled
def _unescape(pairs, escaped, form, x16, x32):  # type: ignore[no-untyped-def]
    """Put the escaped exponents in. Returns how many there are places for, or -1 if there are more than exponents."""
    half = pairs.size
    ones = np.uint64(0x1111111111111111)
    found = 0
    for i in range(0, half, 8):
        word = load_word(pairs, i)
        if word & (word >> np.uint64(1)) & (word >> np.uint64(2)) & (word >> np.uint64(3)) & ones == 0:
            continue
        for k in range(2 * i, 2 * i + 16):
            place = k // 2 + k % 2 * half
            if (pairs[k // 2] >> np.uint8(4 * (k % 2))) & np.uint8(15) != _ESCAPE:
                continue
            if found == escaped.size:
                return -1
            e = escaped[found]
            found += 1
            if form == BFLOAT16:
                x16[place] = (x16[place] & np.uint16(0x807F)) | (np.uint16(e) << np.uint16(7))
            elif form == FLOAT16:
                x16[place] = (x16[place] & np.uint16(0x83FF)) | (np.uint16(e & np.uint8(0x1F)) << np.uint16(10))
            else:
                x32[place] = (x32[place] & np.uint32(0x807FFFFF)) | (np.uint32(e) << np.uint32(23))
    return found


@compiled
def _unpack(packed, segment):  # type: ignore[no-untyped-def]
    """Whether the code is in order, and the segment filled."""
    size = _size(packed)
    if size != segment.size:
        return False
    form = np.int64(packed[0])
    if form == KEPT:
        segment[:] = packed[1:]
        return True
    width = 4 if form == FLOAT32 else 2
    units = size // (UNIT * width)
    blocks = _blocks_of(units)
    lanes = np.empty(4 * _LANE_ROOM, np.uint8)
    all_pairs = np.empty(BLOCK // 2, np.uint8)
    table = np.empty(1 << (2 * LONGEST), np.uint16)
    known = np.zeros(8, np.uint8)
    lengths, order = np.empty(_SYMBOLS, np.int64), np.empty(_SYMBOLS, np.int64)
    used = np.empty(4, np.int64)
    no16, no32 = segment[:0].view(np.uint16), segment[:0].view(np.uint32)
    at, done = HEAD, 0
    for block in range(blocks):
        n = (units * (block + 1) // blocks - units * block // blocks) * UNIT
        rest_bytes = _rest_bytes(form, n)
        head, at = at, at + BLOCK_HEAD
        if at + rest_bytes > packed.size:
            return False
        rest = packed[at : at + rest_bytes]
        at += rest_bytes
        part = segment[done : done + n * width]
        done += n * width
        pairs = all_pairs[: n // 2]
        coded = False
        for k in range(8):
            coded |= packed[head + k] != 0
        if coded:
            same = True
            for k in range(8):
                same &= packed[head + k] == known[k]
            if not same:
                for s in range(_SYMBOLS):
                    lengths[s] = (packed[head + s // 2] >> (4 * (s % 2))) & 15
                found = _in_order(lengths, order)
                if found == 0:
                    return False
                _fill_table(lengths, order, found, table)
                known[:] = packed[head : head + 8]
            for lane in range(4):
                length = _get(packed, head + 8 + 2 * lane, 2)
                if length > _LANE_ROOM or at + length > packed.size:
                    return False
                lanes[lane * _LANE_ROOM : lane * _LANE_ROOM + length] = packed[at : at + length]
                at += length
            _get_lanes(lanes, table, pairs, used)
            for lane in range(4):
                if (used[lane] + 7) // 8 != _get(packed, head + 8 + 2 * lane, 2):
                    return False
        else:
            pairs[:] = np.uint8(0xFF)
        first = packed[head + 18]
        escapes = _get(packed, head + 16, 2)
        if at + escapes > packed.size:
            return False
        escaped = packed[at : at + escapes]
        at += escapes
        x16, x32 = no16, no32
        if form == BFLOAT16:
            x16 = part.view(np.uint16)
            _join_bfloat16(pairs, first, rest, x16)
        elif form == FLOAT16:
            x16 = part.view(np.uint16)
            _join_float16(pairs, first, rest, x16)
        else:
            x32 = part.view(np.uint32)
            _join_float32(pairs, first, rest, x32)
        if (escapes or not coded) and _unescape(pairs, escaped, form, x16, x32) != escapes:
            return False
    left = size - done
    if packed.size - at != left:
        return False
    segment[done:] = packed[at:]
    return True
