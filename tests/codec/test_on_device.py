"""What a device decodes is what the CPU's loops decode, bit for bit: the same torch code on every device there is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from cakekv.chunk import read_header, segments
from cakekv.codec import CODECS, codec_named
from cakekv.codec.base import Codec, Plane
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.on_device import DeviceDecoder
from cakekv.errors import CorruptChunk
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from tests.codec.test_contract import KEY, LAYOUT, PLANES, chunk, encoded, sample

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
RECIPES = ["fp8", "int8", "int4", "kivi", "kivi:bits=3", "kivi:bits=4", "k5v4", "k5v4:group=7", "two_plane", "ladder"]
RECIPES += ["turboquant", "turboquant:center=no,keys=2,values=3"]
MORE = ["int8:group=1", "int4:group=7", "int4:keys=token", "kivi:bits=3,group=2147483647", "ladder:group=5,keys=token"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[*RECIPES, *MORE])
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


def on_device(codec: Codec, plane: Plane, layers: Sequence[Sequence[np.ndarray]], device: torch.device) -> np.ndarray:
    """Planes decoded together: (layers, heads, tokens, width)."""
    codes = [torch.from_numpy(np.stack(part)).to(device) for part in zip(*layers, strict=True)]
    values = codec.decode_tensors(plane, codes)
    assert values.dtype == torch.float32
    return values.cpu().numpy()


def on_cpu(codec: Codec, plane: Plane, codes: Sequence[np.ndarray]) -> np.ndarray:
    values = np.empty(plane.shape, np.float32)
    codec.decode(plane, list(codes), values)
    return values


def _these(views: list[Any], layer: int) -> list[Any]:
    return views


def bits(values: np.ndarray) -> np.ndarray:
    """Tells -0.0 from 0.0; what is no number is as good as any other."""
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


def test_which_codecs_a_device_decodes() -> None:
    kinds = {recipe.partition(":")[0] for recipe in RECIPES}
    assert {name for name in CODECS if codec_named(name).on_device} == kinds
    for name in CODECS.keys() - kinds:
        with pytest.raises(NotImplementedError, match="on CPU cores only"):
            codec_named(name).decode_tensors(PLANES[0], [])
    assert all(codec_named(name).fixed for name in kinds), "codes of any length could not be decoded together"


def test_every_plane_by_every_number_of_parts(codec: Codec, device: torch.device) -> None:
    for plane in PLANES:
        layers = [encoded(codec, plane, sample(plane, seed)) for seed in range(3)]
        for parts in range(1, codec.parts + 1):
            cut = [codes[:parts] for codes in layers]
            expected = np.stack([on_cpu(codec, plane, codes) for codes in cut])
            assert np.isfinite(expected).all()
            found = on_device(codec, plane, cut, device)
            assert np.array_equal(bits(found), bits(expected)), (plane, parts)


def test_codes_at_any_byte(codec: Codec, device: torch.device) -> None:
    """A plane's code begins where the one before it ends."""
    plane = Plane("keys", 0, 4, 1, 33, 8, "float32")
    codes = encoded(codec, plane, sample(plane))
    for offset in (1, 2, 3):
        moved = [torch.from_numpy(np.pad(code, (offset, 5)))[None].to(device)[:, offset:-5] for code in codes]
        found = codec.decode_tensors(plane, moved).cpu().numpy()
        assert np.array_equal(bits(found[0]), bits(on_cpu(codec, plane, codes)))


def test_hostile_bytes_end_in_the_same_numbers(codec: Codec, device: torch.device) -> None:
    rng = random.Random(2)
    for plane in (Plane("keys", 0, 4, 2, 40, 16), Plane("values", 3, 4, 1, 9, 5, "float32")):
        sound = encoded(codec, plane, sample(plane))
        for round_ in range(40):
            codes = [code.copy() for code in sound]
            victim = rng.choice(codes)
            if round_ % 2:
                victim[:] = np.frombuffer(rng.randbytes(len(victim)), np.uint8)
            else:
                begin = rng.randrange(len(victim))
                victim[begin : begin + rng.randrange(1, 64)] = 255
            with np.errstate(over="ignore", invalid="ignore"):
                expected = on_cpu(codec, plane, codes)
            assert np.array_equal(bits(on_device(codec, plane, [codes], device)[0]), bits(expected))


def test_a_code_of_each_byte(device: torch.device) -> None:
    """All 256 numbers of E4M3, also those that are none."""
    codec, plane = codec_named("fp8"), Plane("values", 0, 1, 1, 256, 1, "float32")
    code = np.concatenate([np.array([1.5], "<f4").view(np.uint8), np.arange(256, dtype=np.uint8)])
    assert np.array_equal(bits(on_device(codec, plane, [[code]], device)[0]), bits(on_cpu(codec, plane, [code])))


class Beside:
    """Counts the contexts."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.opened += 1
        try:
            yield
        finally:
            self.closed += 1


ODD = KVLayout(
    (
        LayerLayout((PlaneLayout(3, 17, 2), PlaneLayout(3, 9, 2))),
        LayerLayout((PlaneLayout(3, 17, 2), PlaneLayout(3, 9, 2))),
        LayerLayout((PlaneLayout(1, 40, 2),)),
        LayerLayout((PlaneLayout(3, 17, 2), PlaneLayout(3, 9, 2))),
    )
)
"""Layers of more than one shape, with keys wider than values, or one plane."""


def filled(layout: KVLayout, tokens: int, dtype: str, codec: Codec) -> tuple[ChunkCoder, memoryview]:
    """A random chunk in its coded form."""
    size = getattr(torch, dtype).itemsize
    planes = tuple(
        LayerLayout(tuple(PlaneLayout(plane.heads, plane.width, size) for plane in layer.planes))
        for layer in layout.layers
    )
    coder = ChunkCoder(codec, KVLayout(planes), tokens, dtype)
    exact = memoryview(bytearray(coder.exact.total_bytes))
    rng = np.random.default_rng(5)
    for segment in segments(coder.exact, exact):
        numbers = torch.from_numpy(rng.standard_normal(len(segment) // size) * 3).to(getattr(torch, dtype))
        segment[:] = numbers.view(torch.uint8).numpy().tobytes()
    coded = coder.encode(exact, memoryview(bytearray(coder.exact.total_bytes)), KEY, 0)
    assert coded is not None
    return coder, coded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_chunks(recipe: str, dtype: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to the cache's type, as the CPU rounds; in batches of any length, any layers, any number of parts."""
    for (layout, tokens), most in product([(LAYOUT, 64), (ODD, 83)], [1, 1 << 24]):
        monkeypatch.setattr("cakekv.codec.on_device._BATCH_BYTES", most)
        coder, coded = filled(layout, tokens, dtype, codec_named(recipe))
        assert coder.decodes_on_device
        views, beside = segments(read_header(coded, len(coded)).shape, coded), Beside()
        decoder = DeviceDecoder(coder, device, beside)
        for layers, parts in product([list(range(coder.layers)), [0, 3]], range(1, coder.codec.parts + 1)):
            codes = {layer: [views[part * coder.layers + layer] for part in range(parts)] for layer in layers}
            asked: list[int] = []

            def read(layer: int, codes: Any = codes, asked: list[int] = asked) -> Any:
                asked.append(layer)
                return codes[layer]

            found = decoder.decode(layers, read)
            assert asked == layers
            assert beside.opened == beside.closed
            for layer, segment in zip(layers, found, strict=True):
                expected = bytearray(coder.exact.segment_bytes[layer])
                coder.decode(layer, codes[layer], memoryview(expected), 0)
                assert (segment.device.type, segment.dtype, segment.dim()) == (device.type, torch.uint8, 1)
                assert segment.cpu().numpy().tobytes() == bytes(expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_of_the_wrong_length_are_damage(recipe: str, device: torch.device) -> None:
    coder = ChunkCoder(codec_named(recipe), LAYOUT, 64, "bfloat16")
    _, coded = chunk(coder)
    assert coded is not None
    header, beside = read_header(coded, len(coded)), Beside()
    parts = [segments(header.shape, coded)[index] for index in coder.segments_of(header.shape, [0])]
    decoder = DeviceDecoder(coder, device, beside)
    for wrong in (parts[0][:-1], parts[0][:0], parts[0][:3], memoryview(bytearray(parts[0]) + b"\0")):
        with pytest.raises(CorruptChunk, match="layer 0: it has") as here:
            decoder.decode([0], partial(_these, [wrong, *parts[1:]]))
        with pytest.raises(CorruptChunk) as there:
            coder.decode(0, [wrong, *parts[1:]], memoryview(bytearray(coder.exact.segment_bytes[0])), 0)
        assert (here.value.fault, here.value.detail) == (there.value.fault, there.value.detail)
    assert beside.opened == beside.closed == 4


def test_what_verifying_raises_ends_it_once_the_device_is_done(device: torch.device) -> None:
    coder = ChunkCoder(codec_named("int8"), LAYOUT, 64, "bfloat16")
    _, coded = chunk(coder)
    assert coded is not None
    views, beside = segments(read_header(coded, len(coded)).shape, coded), Beside()

    def verified(layer: int) -> list[memoryview]:
        if layer == 3:
            assert beside.closed == 0
            raise KeyError(layer)
        return [views[layer]]

    with pytest.raises(KeyError):
        DeviceDecoder(coder, device, beside).decode(range(5), verified)
    assert beside.closed == 1


def test_work_behind_decoding_is_beside_the_model_too(device: torch.device) -> None:
    coder = ChunkCoder(codec_named("int8"), LAYOUT, 64, "bfloat16")
    _, coded = chunk(coder)
    assert coded is not None
    views, beside, seen = segments(read_header(coded, len(coded)).shape, coded), Beside(), []

    def finish(layer: int, segment: torch.Tensor) -> torch.Tensor:
        assert beside.closed == 0
        seen.append(layer)
        return segment[:2] + layer

    found = DeviceDecoder(coder, device, beside, finish).decode([4, 1], lambda layer: [views[layer]])
    plain = DeviceDecoder(coder, device, nullcontext).decode([4, 1], lambda layer: [views[layer]])
    assert seen == [4, 1]
    for layer, one, other in zip(seen, found, plain, strict=True):
        assert torch.equal(one, other[:2] + layer)


def test_warming_up_decodes_what_loads_will_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe, parts in (("int4", 1), ("ladder:read=2", 2), ("two_plane:read=upper", 1)):
        coder, seen = ChunkCoder(codec_named(recipe), LAYOUT, 64, "bfloat16"), list[int]()
        kind = type(coder.codec)
        plain: Callable[..., torch.Tensor] = kind.decode_tensors

        def counted(
            self: Codec, plane: Plane, codes: list[torch.Tensor], plain: Any = plain, seen: Any = seen
        ) -> torch.Tensor:
            seen.append(len(codes))
            return plain(self, plane, codes)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "decode_tensors", counted)
            DeviceDecoder(coder, device, nullcontext).warm_up()
        assert seen == [parts, parts], "keys and values"
