"""Segments go to the cache and come back, wherever they lie and whichever of them there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.engine.cache import LayerShape, Plane, TwoEndedCache
from cakekv.engine.transfer import HostTransfer

CPU = torch.device("cpu")
SAME = (Plane(2, 4, torch.float32), Plane(2, 4, torch.float32))
LATENT = (Plane(1, 6, torch.bfloat16), Plane(3, 2, torch.bfloat16))
CAPACITY, START, TOKENS = 12, 3, 5

layers = st.lists(
    st.tuples(st.sampled_from([SAME, LATENT]), st.sampled_from([None, 4]), st.booleans()) | st.none(),
    min_size=1,
    max_size=7,
).filter(lambda found: any(layer is not None for layer in found))


def expected(cache: TwoEndedCache, layer: int) -> bytes:
    """A layer's segment, region by region."""
    regions = [region[:, START : START + TOKENS].contiguous() for region in cache.stored[layer].regions]
    return b"".join(region.view(torch.uint8).numpy().tobytes() for region in regions)


def placed_in(sizes: Sequence[int], order: Sequence[int], gaps: Sequence[int]) -> list[memoryview]:
    """Segments in one buffer, in an order, with gaps before them."""
    buffer, offset = memoryview(bytearray(sum(sizes) + sum(gaps))), 0
    found: dict[int, memoryview] = {}
    for index, gap in zip(order, gaps, strict=True):
        offset += gap
        found[index] = buffer[offset : offset + sizes[index]]
        offset += sizes[index]
    return [found[index] for index in range(len(sizes))]


@given(layers, st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_placed_is_there_and_what_is_gathered_is_the_same(
    found: list[tuple[tuple[Plane, Plane], int | None, bool] | None], data: st.DataObject
) -> None:
    shapes = [None if layer is None else LayerShape(*layer[0], layer[1]) for layer in found]
    wanted = [layer[2] for layer in found if layer is not None]
    cache, back = (TwoEndedCache(shapes, CAPACITY, CPU) for _ in range(2))
    sizes = [TOKENS * layer.token_bytes for layer in cache.stored]
    order = data.draw(st.permutations(range(len(sizes))) | st.just(list(range(len(sizes)))))
    gaps = data.draw(st.just([8] * len(sizes)) | st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    segments = placed_in(sizes, order, gaps)
    for segment in segments:
        segment[:] = np.random.default_rng(len(segment)).bytes(len(segment))

    parts = [segment if one else None for segment, one in zip(segments, wanted, strict=True)]
    assert HostTransfer().place(cache, START, TOKENS, parts) == sum(len(part) for part in parts if part is not None)
    for layer, segment in enumerate(segments):
        assert expected(cache, layer) == (bytes(segment) if wanted[layer] else bytes(len(segment)))
        for region in cache.stored[layer].regions:
            assert not region[:, :START].any()
            assert not region[:, START + TOKENS :].any()

    HostTransfer().place(back, START, TOKENS, segments)
    for segment in segments:
        segment[:] = bytes(len(segment))
    HostTransfer().gather(back, START, TOKENS, segments)
    assert [bytes(segment) for segment in segments] == [expected(back, layer) for layer in range(len(segments))]
    assert any(any(segment) for segment in segments)


@pytest.mark.parametrize("length", [1, 3])
def test_segments_at_equal_distances_are_copied_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TwoEndedCache([LayerShape(*SAME, None)] * length, CAPACITY, CPU)
    sizes = [TOKENS * layer.token_bytes for layer in cache.stored]
    copies: list[tuple[int, ...]] = []
    monkeypatch.setattr(np, "copyto", lambda target, source: copies.append(target.shape))
    HostTransfer().place(cache, START, TOKENS, placed_in(sizes, range(length), [64] * length))
    assert copies == [(length, 4, TOKENS, 16)]
