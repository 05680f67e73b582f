"""What every registered codec must do, run for each, on planes of many shapes."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from cakekv.chunk import Form, read_header, segments
from cakekv.codec import CODECS, codec_named
from cakekv.codec.base import Codec, DamagedCode, Plane
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.elements import from_elements, to_elements
from cakekv.errors import CannotEncode, CorruptChunk
from cakekv.keys import ChunkKey
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from cakekv.rotation import Rotation
from tests.bases import planes_of, ready

KEY = ChunkKey(bytes(range(32)))
MORE = ["cachegen:level=1", "kivi:bits=3", "kivi:bits=4", "int4:group=7", "int4:keys=token", "think:pairwise=yes"]
MORE += ["k5v4:group=7", "nuq3:rope=after", "turboquant:keys=3,values=2"]
RECIPES = [*CODECS, *MORE]
SHAPES = [(1, 1, 1), (2, 5, 3), (1, 33, 8), (3, 16, 64), (2, 64, 32), (2, 40, 80)]
TYPES = ["bfloat16", "float16", "float32"]


def rotation(width: int, interleaved: bool = False) -> Rotation:
    """The usual frequencies, of the first half of the elements."""
    return Rotation(tuple(10000.0 ** (-pair / (width // 4)) for pair in range(width // 4)), interleaved)


PLANES = [
    *(
        Plane("keys", 0, 4, *shape, dtype, rotation(shape[2], interleaved), start=777)
        for shape, dtype, interleaved in product(SHAPES, TYPES, [False, True])
    ),
    *(Plane("values", 3, 4, *shape, dtype) for shape, dtype in product(SHAPES, TYPES)),
]
ERROR = {"raw": 0.0, "int8": 0.008, "fp8": 0.07, "two_plane": 0.008, "int4": 0.08, "kivi": 0.35, "think": 1.0}
ERROR |= {
    "kvtc": 0.5,
    "kvtc_ladder": 0.5,
    "k5v4": 0.08,
    "cachegen": 0.08,
    "nuq3": 0.3,
    "ladder": 0.008,
    "turboquant": 0.3,
}
"""Largest error of an element, as a share of the largest magnitude in its plane."""


def sample(plane: Plane, seed: int = 0) -> Any:
    """Channels of different size and mean, as keys have them; rounded to what the plane's type can hold."""
    rng = np.random.default_rng(seed)
    heads, _, width = plane.shape
    spread, mean = rng.uniform(0.1, 4, (heads, 1, width)), rng.uniform(-6, 6, (heads, 1, width))
    values = (rng.standard_normal(plane.shape) * spread + mean).astype(np.float32)
    data = np.empty(plane.raw_bytes, np.uint8)
    to_elements(values, plane.dtype, data)
    return np.array(from_elements(data, plane.dtype, plane.shape), np.float32)


def encoded(codec: Codec, plane: Plane, values: Any) -> list[Any]:
    codec, codes = ready(codec, [plane]), []
    for part in range(codec.parts):
        code = np.full(codec.size(plane, part) + 16, 0xA5, np.uint8)
        used = codec.encode(plane, values, code[:-16], part)
        assert used == len(code) - 16 if codec.fixed else used <= len(code) - 16
        assert (code[-16:] == 0xA5).all()
        codes.append(code[:used].copy())
    return codes


def decoded(codec: Codec, plane: Plane, codes: list[Any]) -> Any:
    room = np.full((plane.heads + 2, *plane.shape[1:]), np.nan, np.float32)
    ready(codec, [plane]).decode(plane, codes, room[1:-1])
    assert np.isnan(room[[0, -1]]).all()
    return room[1:-1].copy()


@pytest.fixture(params=RECIPES)
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


def test_what_is_encoded_comes_back_nearly(codec: Codec) -> None:
    for plane in PLANES:
        values = sample(plane)
        codes = encoded(codec, plane, values)
        back = decoded(codec, plane, codes)
        assert np.isfinite(back).all()
        assert np.abs(back - values).max() <= ERROR[codec.name] * np.abs(values).max(), plane
        assert np.array_equal(back, decoded(codec, plane, codes))
        assert all(np.array_equal(a, b) for a, b in zip(codes, encoded(codec, plane, values), strict=True))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-38, 1e29, -1e29])
def test_planes_of_one_value(codec: Codec, value: float) -> None:
    unturned = Rotation(())
    for plane in (Plane("keys", 0, 1, 2, 20, 16, "float32", unturned), Plane("values", 0, 1, 2, 20, 16, "float32")):
        values = np.full(plane.shape, value, np.float32)
        back = decoded(codec, plane, encoded(codec, plane, values))
        if codec.name.startswith("kvtc"):  # their steps are the model's, not the plane's
            assert np.isfinite(back).all()
            continue
        kept = back if codec.name != "think" or plane.role == "values" else back[back != 0]
        assert np.allclose(kept, value, rtol=0.01, atol=1e-36)


def test_extremes_beside_each_other(codec: Codec) -> None:
    plane = Plane("keys", 0, 1, 1, 16, 16, "float32", rotation(16))
    values = np.where(np.arange(256).reshape(plane.shape) % 3, 1e30, -1e30).astype(np.float32)
    assert np.isfinite(decoded(codec, plane, encoded(codec, plane, values))).all()


def test_hostile_bytes_end_in_an_error_or_in_numbers(codec: Codec) -> None:
    rng = random.Random(1)
    keys = Plane("keys", 0, 4, 2, 40, 16, rotation=rotation(16), start=2**40)
    for plane in (keys, Plane("values", 3, 4, 1, 9, 5, "float32")):
        codes = encoded(codec, plane, sample(plane))
        for _ in range(60):
            bad = [code.copy() for code in codes]
            victim = rng.choice(bad)
            kind = rng.randrange(4)
            if kind == 0:
                victim[rng.randrange(len(victim))] ^= 1 << rng.randrange(8)
            elif kind == 1:
                victim[:] = np.frombuffer(rng.randbytes(len(victim)), np.uint8)
            elif kind == 2:
                begin = rng.randrange(len(victim))
                victim[begin : begin + rng.randrange(1, 64)] = 255
            elif not codec.fixed:
                bad[0] = victim[: rng.randrange(len(victim))].copy()
            with suppress(DamagedCode):
                decoded(codec, plane, bad)


def test_every_parameter_is_in_the_fingerprint(codec: Codec) -> None:
    others: dict[str, Any] = {
        "group": 16,
        "window": 77,
        "bits": 3,
        "keys": "token",
        "drop": 0.25,
        "pairwise": True,
        "read": "upper",
    }
    others |= {"level": 3, "outliers": 0.03, "rope": "after"}
    if codec.name in ("ladder", "kvtc_ladder"):
        others["read"] = 1
    if codec.name == "turboquant":
        others |= {"keys": 4, "values": 2, "center": not getattr(codec, "center", True)}
    if codec.name == "kivi" and codec.fingerprint.count('"bits":3'):
        others["bits"] = 4
    if codec.name == "raw":
        assert codec.fingerprint == "raw"
        return
    for field in fields(codec):
        value = others[field.name]
        if value == getattr(codec, field.name):
            continue
        other = replace(codec, **{field.name: value})
        assert (other.fingerprint == codec.fingerprint) == (field.name in codec.choices), field.name


LAYOUT = KVLayout(tuple(LayerLayout((PlaneLayout(2, 32, 2), PlaneLayout(2, 32, 2))) for _ in range(5)))


def chunk(coder: ChunkCoder, seed: int = 0) -> tuple[bytearray, memoryview | None]:
    """A random chunk's exact segments, and its coded form."""
    exact = bytearray(coder.exact.total_bytes)
    for layer, view in enumerate(segments(coder.exact, memoryview(exact))):
        plane = Plane("keys", layer, 5, 4, coder.exact.tokens, 32)
        to_elements(sample(plane, seed + layer), "bfloat16", np.frombuffer(view, np.uint8))
    coded = coder.encode(memoryview(exact), memoryview(bytearray(coder.exact.total_bytes)), KEY, 128)
    return exact, coded


def coder_of(codec: Codec) -> ChunkCoder:
    codec = ready(codec, planes_of(LAYOUT))
    return ChunkCoder(codec, LAYOUT, 64, "bfloat16", lambda: [rotation(32)] * 5)


def test_chunks_are_sealed_read_and_decoded(codec: Codec) -> None:
    coder = coder_of(codec)
    exact, coded = chunk(coder)
    if codec.name == "raw":
        assert coded is None
        return
    assert coded is not None
    assert len(coded) < coder.exact.total_bytes
    assert not coder.is_exact(len(coded))
    header = read_header(coded, len(coded))
    coder.check(header, KEY, 128)
    assert header.shape.form is Form.CODED
    if codec.fixed:
        assert header.shape == coder.longest == coder.shape_of(len(coded)) == coder.expected([len(coded)])
    else:
        assert coder.shape_of(len(coded)) is None
        assert 0.8 < coder.expected([len(coded)]).total_bytes / len(coded) < 1.25
    views = segments(header.shape, coded)
    for layer in range(5):
        room = bytearray(coder.exact.segment_bytes[layer])
        coder.decode(layer, [views[i] for i in coder.segments_of(header.shape, [layer])], memoryview(room), 128)
        near = from_elements(np.frombuffer(room, np.uint8), "bfloat16", (4, 64, 32))
        true = from_elements(
            np.frombuffer(segments(coder.exact, memoryview(exact))[layer], np.uint8), "bfloat16", (4, 64, 32)
        )
        assert np.abs(near - true).max() <= ERROR[codec.name] * np.abs(true).max()


def test_segments_of_the_wrong_length_are_damage(codec: Codec) -> None:
    coder = coder_of(codec)
    _, coded = chunk(coder)
    if coded is None:
        return
    header = read_header(coded, len(coded))
    views = segments(header.shape, coded)
    parts = [views[i] for i in coder.segments_of(header.shape, [0])]
    room = memoryview(bytearray(coder.exact.segment_bytes[0]))
    for wrong in (parts[0][:-1], parts[0][:0], parts[0][:3], memoryview(bytes(parts[0]) + b"\0")):
        with pytest.raises(CorruptChunk):
            coder.decode(0, [wrong, *parts[1:]], room, 128)


def test_what_is_not_finite_is_refused(codec: Codec) -> None:
    coder = coder_of(codec)
    if not coder.encodes:
        return
    for bad in (b"\x80\x7f", b"\xc0\x7f", b"\x80\xff", b"\x7f\x7f"):  # infinite, not a number, minus infinite, 3e38
        exact, _ = chunk(coder)
        offset = coder.exact.offsets[2]
        exact[offset + 10 : offset + 12] = bad
        with pytest.raises(CannotEncode, match="layer 2"):
            coder.encode(memoryview(exact), memoryview(bytearray(len(exact))), KEY, 0)
