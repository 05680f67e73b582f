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


def states(tokens: int, sequences: int = 1) -> list[torch.Tensor]:
    return [torch.randn(sequences, plane.heads, tokens, plane.width) for plane in SAME]


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    (layer,) = TwoEndedCache([LayerShape(*SAME, None)], 10, CPU).stored
    layer.update(*states(10))
    before = layer.keys.clone()
    for tokens in (1, 5):
        with pytest.raises(BadInput, match=f"room for 10 tokens: {tokens} more do not fit behind the 10.*room=N"):
            layer.update(*states(tokens))
    assert (layer.length, layer.keys.equal(before)) == (10, True)


def test_it_holds_one_sequence_and_no_gradients() -> None:
    (layer,) = TwoEndedCache([LayerShape(*SAME, None)], 10, CPU).stored
    for refused in (
        lambda: layer.update(*states(1, sequences=2)),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.batch_select_indices(torch.tensor([0])),
        lambda: layer.reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(BadInput, match=r"one sequence.*dynamic_cache"):
            refused()
    keys, values = states(1)
    with pytest.raises(BadInput, match="no_grad"):
        layer.update(keys.requires_grad_(), values)
    assert layer.length == 0


@pytest.mark.parametrize("window", [None, 4])
def test_keys_and_values_are_what_the_next_token_sees(window: int | None) -> None:
    (ours,) = TwoEndedCache([LayerShape(*SAME, window)], 20, CPU).stored
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    for tokens in (2, 5, 1):
        new = states(tokens)
        ours.update(*new)
        theirs.update(*new)
        assert ours.keys.equal(theirs.keys)
        assert ours.values.equal(theirs.values)


def test_crop_forgets_the_last_tokens() -> None:
    cache = TwoEndedCache([LayerShape(*SAME, None), LayerShape(*SAME, 4)], 20, CPU)
    for layer in cache.stored:
        layer.update(*states(12))
    kept = [layer.keys.clone() for layer in cache.stored]
    for layer in cache.stored:
        layer.update(*states(3))
    cache.crop(-3)
    assert [layer.keys.equal(keys) for layer, keys in zip(cache.stored, kept, strict=True)] == [True, True]
    for wrong in (5, -13):
        with pytest.raises(BadInput, match=rf"crop\({wrong}\) of 12 tokens"):
            cache.crop(wrong)


def test_a_window_goes_back_no_further_than_what_was_loaded() -> None:
    cache = TwoEndedCache([LayerShape(*SAME, None), LayerShape(*SAME, 4)], 20, CPU)
    cache.set_length(11)  # a suffix begins here, which sees the positions from 8 on; earlier ones may not be there
    for layer in cache.stored:
        layer.update(*states(2))
    assert cache.dynamic_cache(11).get_seq_length() == 11
    for refused in (lambda: cache.dynamic_cache(10), lambda: cache.crop(-3)):
        with pytest.raises(BadInput, match=r"cannot be cut to 10: .* window of 4 only the positions from 8 .*prefill"):
            refused()
    cache.set_length(13)
    assert cache.dynamic_cache(12).get_seq_length() == 12, "going on where it ended takes nothing away"
    with pytest.raises(BadInput, match="cannot be cut to 14"):
        cache.dynamic_cache(14)
