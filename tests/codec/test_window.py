"""Which chunks of a prompt have to be exact."""

from __future__ import annotations

import pytest

from cakekv.codec.base import first_exact_chunk


@pytest.mark.parametrize(
    ("tokens", "window", "first"),
    [(1000, 0, 7), (1000, 1, 7), (1000, 104, 7), (1000, 105, 6), (896, 1, 6), (50, 99, 0)],
)
def test_chunks_with_a_token_in_the_window_are_exact(tokens: int, window: int, first: int) -> None:
    assert first_exact_chunk(tokens, window, 128) == first
    for chunk in range(8):
        assert ((chunk + 1) * 128 > tokens - window) == (chunk >= first)
