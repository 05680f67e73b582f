"""The rotation codec: its levels, its rotations, and what means and attention sinks do to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from cakekv.codec import codec_named
from cakekv.codec.base import Plane
from cakekv.codec.turboquant import _levels, _rotation, _turn, _turn_back
from cakekv.errors import BadInput

WIDTHS = [1, 2, 3, 9, 17, 64, 80, 96, 128, 256, 576]


def coded(recipe: str, plane: Plane, values: Any) -> Any:
    code = np.empty(codec_named(recipe).size(plane), np.uint8)
    codec_named(recipe).encode(plane, values, code)
    return code


def there_and_back(recipe: str, plane: Plane, values: Any) -> Any:
    back = np.empty_like(values)
    codec_named(recipe).decode(plane, [coded(recipe, plane, values)], back)
    return back


def normal(*shape: int) -> Any:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "printed"),
    [
        (2, [0.453, 1.51]),
        (3, [0.245, 0.756, 1.344, 2.152]),
        (4, [0.128, 0.388, 0.657, 0.942, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_levels_of_wide_heads_are_those_in_print(bits: int, printed: list[float]) -> None:
    levels = _levels(bits, 1024) * 32
    assert np.allclose(levels[len(printed) :], printed, rtol=0.01)
    assert np.array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_level_is_the_mean_of_what_is_nearest_to_it(bits: int, width: int) -> None:
    levels = _levels(bits, width).astype(np.float64)
    at = np.linspace(-1, 1, 400_001)
    weight = (1 - at**2).clip(0) ** ((max(width, 3) - 3) / 2)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, at)
    means = np.bincount(nearest, weight * at) / np.bincount(nearest, weight)
    assert np.allclose(means, levels, atol=0.002 * levels[-1])


@pytest.mark.parametrize(("bits", "error"), [(2, 0.117), (3, 0.0345), (4, 0.0095), (5, 0.0025)])
@pytest.mark.parametrize("width", [96, 256])
def test_the_square_error_is_the_papers(bits: int, error: float, width: int) -> None:
    plane, values = Plane("keys", 0, 1, 2, 64, width), normal(2, 64, width)
    values[..., :8] *= 5  # outliers make no difference
    away = there_and_back(f"turboquant:center=no,keys={bits}", plane, values) - values
    assert (away**2).sum() / (values**2).sum() == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("width", WIDTHS)
def test_rotations_are_orthogonal_and_spread_every_channel(width: int) -> None:
    signs, mix = _rotation(width)
    turned, room = np.eye(width, dtype=np.float32), np.empty(width, np.float32)
    for row in turned:
        _turn(row, signs, mix, room)
    assert np.allclose(turned @ turned.T, np.eye(width), atol=1e-5)
    assert np.abs(turned).max() <= 3.5 / np.sqrt(width)
    for row in turned:
        _turn_back(row, mix, room)
    assert np.allclose(turned * signs, np.eye(width), atol=1e-5)


def test_every_machine_has_the_same_tables() -> None:
    tables = [_levels(bits, width) for bits in (2, 3, 4, 5) for width in WIDTHS]
    tables += [table for width in WIDTHS for table in _rotation(width)]
    digest = blake3(b"".join(table.astype("<f4").tobytes() for table in tables)).hexdigest(8)
    assert digest == "c5c0ed2ca3a5f7bd", "chunks stored elsewhere would be decoded wrongly: set `version` up"


@pytest.mark.parametrize("width", [9, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("center", ["yes", "no"])
def test_all_widths_come_back_and_devices_agree(width: int, center: str) -> None:
    recipe = f"turboquant:center={center}"
    for role in ("keys", "values"):
        plane, values = Plane(role, 0, 1, 3, 64, width), normal(3, 64, width)
        back = there_and_back(recipe, plane, values)
        assert ((back - values) ** 2).mean() < (0.004 if role == "keys" else 0.012) * (values**2).mean()
        code = torch.from_numpy(coded(recipe, plane, values))[None]
        found = codec_named(recipe).decode_tensors(plane, [code])[0].numpy()
        assert found.tobytes() == back.tobytes()


def test_means_cost_nothing() -> None:
    plane, values = Plane("keys", 0, 1, 2, 64, 64), normal(2, 64, 64)
    values += 10 * normal(2, 1, 64)
    errors = [((there_and_back(recipe, plane, values) - values) ** 2).mean() for recipe in RECIPES]
    assert errors[0] < 0.003 < 0.1 < errors[1]


RECIPES = ["turboquant", "turboquant:center=no"]


def test_a_sink_is_nearly_exact() -> None:
    """A token that all attend to, with hardly a value, among others that have much in common."""
    plane, values = Plane("values", 0, 1, 1, 64, 64), normal(1, 64, 64)
    values += 3
    values[0, 5] = normal(64) / 50
    for recipe in ("turboquant", "turboquant:values=2"):
        away = there_and_back(recipe, plane, values)[0, 5] - values[0, 5]
        assert np.linalg.norm(away) < 0.01 * np.linalg.norm(values[0, 5])


def test_a_shortest_token_that_is_nowhere_is_one_of_them() -> None:
    codec, plane, values = codec_named("turboquant"), Plane("keys", 0, 1, 2, 5, 8), normal(2, 5, 8)
    code = coded("turboquant", plane, values)
    index = 4 * 2 + 2 * 5 + 4 * 4  # behind scales, norms and scales again
    for damage in (b"\xff\xff\xff\xff", b"\x05\0\0\0", b"\0\0\0\x80"):
        code[index : index + 4] = np.frombuffer(damage, np.uint8)
        back = np.full_like(values, np.nan)
        codec.decode(plane, [code], back)
        assert np.isfinite(back).all()
        assert codec.decode_tensors(plane, [torch.from_numpy(code)[None]])[0].numpy().tobytes() == back.tobytes()


@pytest.mark.parametrize("field", ["keys", "values"])
@pytest.mark.parametrize("bits", [0, 1, 6, 8])
def test_other_numbers_of_bits_are_refused(field: str, bits: int) -> None:
    with pytest.raises(BadInput, match=f"codec turboquant: {field} is {bits}, but must be 2, 3, 4 or 5 bits"):
        codec_named(f"turboquant:{field}={bits}")
