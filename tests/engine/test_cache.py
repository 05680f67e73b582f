"""The two-ended cache answers a forward exactly as transformers' own cache does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cakekv.engine.cache import LayerShape, Plane, TwoEndedCache
from cakekv.engine.versions import DummyLayer
from cakekv.errors import BadInput

CPU = torch.device("cpu")
SAME = (Plane(2, 4, torch.float32), Plane(2, 4, torch.float32))
LATENT = (Plane(1, 6, torch.bfloat16), Plane(3, 2, torch.bfloat16))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.none() | st.integers(2, 12), st.sampled_from([SAME, LATENT])
)
@settings(max_examples=60, deadline=None)
def test_updates_return_what_transformers_returns(
    spans: list[int], window: int | None, planes: tuple[Plane, Plane]
) -> None:
    (ours,) = TwoEndedCache([LayerShape(*planes, window)], sum(spans), CPU).stored
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    for span in spans:
        assert ours.get_mask_sizes(span) == theirs.get_mask_sizes(span)
        states = [torch.randn(1, plane.heads, span, plane.width).to(plane.dtype) for plane in planes]
        for got, expected in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("planes", [SAME, LATENT])
def test_regions_hold_the_bytes_of_a_segment(planes: tuple[Plane, Plane]) -> None:
    cache = TwoEndedCache([LayerShape(*planes, None)], 10, CPU)
    (layer,), (stack,) = cache.stored, cache.stacks
    states = [torch.randn(1, plane.heads, 10, plane.width).to(plane.dtype) for plane in planes]
    layer.update(*states)
    segment = b"".join(region[:, 3:7].tobytes() for region in (regions[0] for regions in stack.regions))
    assert segment == b"".join(plane[0, :, 3:7].contiguous().view(torch.uint8).numpy().tobytes() for plane in states)
    assert len(segment) == 4 * layer.token_bytes


def test_set_length_moves_every_layer_that_stores() -> None:
    cache = TwoEndedCache([LayerShape(*SAME, None), None, LayerShape(*LATENT, 4)], 20, CPU)
    cache.set_length(7)
    assert [layer.length for layer in cache.stored] == [7, 7]
    assert cache.is_sliding == [False, False, True]
    assert [isinstance(layer, DummyLayer) for layer in cache.layers] == [False, True, False]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_cache_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(BadInput, match="no memory for a KV cache"):
        TwoEndedCache([LayerShape(*SAME, None)], 1 << 45, CPU)
