"""Chunks of which a method keeps some rows: what is written, what comes back, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from cakekv.chunk import read_header, segments
from cakekv.codec import CODECS, codec_named
from cakekv.codec.base import Codec, DamagedCode, Plane
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.rows import Rows, codec_of_rows
from cakekv.compress.base import Layer, Merged, Method
from cakekv.compress.key_norm import KeyNorm
from cakekv.errors import BadInput, CannotEncode
from cakekv.keys import ChunkKey
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from tests.codec.test_contract import ERROR, sample

KEY = ChunkKey(bytes(range(32)))
INNER = ["raw", "int8", "int4", "fp8", "k5v4", "kivi", "think", "turboquant"]
PLANES = [
    Plane(role, 1, 4, *shape, dtype)
    for role in ("keys", "values")
    for shape, dtype in [((1, 1, 1), "float32"), ((3, 37, 16), "bfloat16"), ((2, 64, 32), "float16")]
]  # fmt: skip


def rows_of(inner: str, share: float = 0.5) -> Rows:
    return Rows(method=KeyNorm(share), inner=codec_named(inner))


def holed(plane: Plane, seed: int = 0) -> Any:
    """Planes of which rows are gone, of each head others; at least one is left."""
    values, gone = sample(plane, seed), np.random.default_rng(seed).random(plane.shape[:2]) < 0.4
    gone[:, -1] = False
    values[gone] = np.nan
    return values


def encoded(codec: Codec, plane: Plane, values: Any) -> Any:
    code = np.full(codec.size(plane) + 16, 0xA5, np.uint8)
    used = codec.encode(plane, values, code[:-16])
    assert used <= len(code) - 16
    assert (code[-16:] == 0xA5).all()
    return code[:used].copy()


@pytest.mark.parametrize("inner", INNER)
def test_rows_come_back_where_they_were(inner: str) -> None:
    codec = rows_of(inner)
    for plane in PLANES:
        values = holed(plane)
        code, back = encoded(codec, plane, values), np.empty(plane.shape, np.float32)
        codec.decode(plane, [code], back)
        gone = np.isnan(values[..., 0])
        assert np.isnan(back[gone]).all() if plane.role == "keys" else not back[gone].any()
        error = np.abs(back - values)[~gone].max()
        assert error <= ERROR[inner] * np.abs(values[~gone]).max()
        assert len(code) < len(encoded(codec, plane, sample(plane))) or not gone.any()


def test_every_codec_is_an_inner_one_or_refused() -> None:
    for name in CODECS:
        if name not in INNER:
            with pytest.raises(BadInput, match=f"codec {name} does not go with compress key_norm at store, because"):
                rows_of(name)
    with pytest.raises(BadInput, match="int8"):
        replace(rows_of("raw"), inner=codec_named("cachegen"))


def test_hostile_bytes_end_in_an_error_or_in_rows() -> None:
    rng, codec = random.Random(1), rows_of("int8")
    for plane in PLANES[1:3]:
        whole = encoded(codec, plane, holed(plane))
        caught = 0
        for _ in range(200):
            bad = whole.copy()
            kind = rng.randrange(3)
            if kind == 0:
                bad[rng.randrange(plane.heads * 5)] ^= 1 << rng.randrange(8)
            elif kind == 1:
                bad[:] = np.frombuffer(rng.randbytes(len(bad)), np.uint8)
            else:
                bad = bad[: rng.randrange(len(bad))]
            try:
                codec.decode(plane, [bad], np.empty(plane.shape, np.float32))
            except DamagedCode:
                caught += 1
        assert caught > 100
    nothing = np.zeros_like(whole)
    with pytest.raises(DamagedCode, match="which rows there are"):
        codec.decode(plane, [nothing], np.empty(plane.shape, np.float32))


def layout(*windows: int | None) -> KVLayout:
    return KVLayout(tuple(LayerLayout((PlaneLayout(2, 16, 4),) * 2, window) for window in windows))


def chunk_of(codec: Codec, *windows: int | None, position: int = 640) -> tuple[Any, list[Any], int]:
    """The planes of a made-up chunk, those that come back, and the bytes that it takes."""
    coder = ChunkCoder(codec, layout(*windows), 32, "float32")
    exact, coded = (memoryview(bytearray(coder.exact.total_bytes)) for _ in range(2))
    rng = np.random.default_rng(5)
    planes = rng.standard_normal((len(windows), 2, 2, 32, 16)).astype("<f4")
    for segment, layer in zip(segments(coder.exact, exact), planes, strict=True):
        segment[:] = layer.tobytes()
    chunk = coder.encode(exact, coded, KEY, position)
    assert chunk is not None
    header = read_header(chunk, len(chunk))
    coder.check(header, KEY, position)
    back = []
    for layer, code in enumerate(segments(header.shape, chunk)):
        room = memoryview(bytearray(coder.exact.segment_bytes[layer]))
        coder.decode(layer, [code], room, position)
        back.append(np.frombuffer(room, "<f4").reshape(2, 2, 32, 16))
    return planes, back, len(chunk)


def test_what_a_method_keeps_of_a_chunk() -> None:
    """Every head keeps its own rows, and their bits; a layer with a window keeps all."""
    planes, back, size = chunk_of(rows_of("raw", 0.25), None, 100, None)
    for number, (layer, found) in enumerate(zip(planes, back, strict=True)):
        for head in range(2):
            order = np.argsort(np.linalg.norm(layer[0, head], axis=-1))
            kept = range(32) if number == 1 else sorted(order[:8])
            assert np.flatnonzero(~np.isnan(found[0, head]).any(-1)).tolist() == list(kept)
            assert np.array_equal(found[:, head, kept], layer[:, head, kept])
    assert size <= 4096 + planes[1].nbytes + (planes[0].nbytes + planes[2].nbytes) // 4 + 4096  # rounded up


@dataclass(frozen=True)
class Pairs(Method):
    """The second of every two tokens stands for both."""

    name: ClassVar[str] = "pairs"
    times: ClassVar[frozenset[str]] = frozenset({"store"})
    factor: float = 1.0
    bias: bool = False
    nothing: bool = False

    @property
    def at(self) -> frozenset[str]:
        return self.times

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        assert [layer.length for layer in layers] == [640 + 32] * len(layers)
        assert all(layer.queries is None for layer in layers)
        return [(layer.positions % 2 == 1) & (not self.nothing) for layer in layers]

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged:
        keys, values = (one.clone() for one in (layer.keys, layer.values))
        for one in (keys, values):
            one[:, 1::2] = (one[:, ::2] + one[:, 1::2]) / 2 * self.factor
        return Merged(keys, values, torch.zeros(kept.shape) if self.bias else None)


def test_what_a_method_merges_is_stored() -> None:
    planes, back, _ = chunk_of(Rows(method=Pairs(), inner=codec_named("raw")), None, None)
    for layer, found in zip(planes, back, strict=True):
        assert np.array_equal(found[:, :, 1::2], (layer[:, :, ::2] + layer[:, :, 1::2]) / 2)
        assert np.isnan(found[0, :, ::2]).all()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Pairs(factor=float("inf")), "merges in layer 0, tokens from 640, is not finite"),
        (Pairs(bias=True), "gives rows a bias"),
        (Pairs(nothing=True), "keeps nothing of a head of layer 0"),
    ],
)
def test_what_cannot_be_stored(method: Method, says: str) -> None:
    with pytest.raises(CannotEncode, match=says):
        chunk_of(Rows(method=method, inner=codec_named("raw")), None)


def test_who_a_chunk_is_says_what_made_it() -> None:
    made = [rows_of("raw"), rows_of("int8"), rows_of("raw", 0.25), Rows(method=Pairs(), inner=codec_named("raw"))]
    made.append(Rows(window=64, method=KeyNorm(), inner=codec_named("int8:window=64")))
    names = {codec.fingerprint for codec in made} | {codec_named(name).fingerprint for name in INNER}
    assert len(names) == len(made) + len(INNER)


def test_methods_that_act_later_change_nothing_of_what_is_stored() -> None:
    int8 = codec_named("int8:window=32")
    assert codec_of_rows(int8, [KeyNorm(when="prefill")]) is int8
    made = codec_of_rows(int8, [KeyNorm(when="prefill"), KeyNorm()])
    assert isinstance(made, Rows)
    assert made.window == 32
    assert codec_of_rows(made, [KeyNorm()]) is made


def test_methods_that_move_entries_are_refused() -> None:
    @dataclass(frozen=True)
    class Compact(Pairs):
        compact: ClassVar[bool] = True

    with pytest.raises(BadInput, match="keeps its positions"):
        Rows(method=Compact(), inner=codec_named("raw"))
