"""Which blocks of vLLM's cache are not exact any more."""

from __future__ import annotations

from cakekv.codec.int8 import Int8
from cakekv.codec.raw import Raw
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks

BLOCK = 16
OWN = list(range(100, 110))


def lossy_blocks(window: int = 0) -> LossyBlocks:
    return LossyBlocks(Int8(window=window), BLOCK)


def test_what_is_computed_behind_lossy_blocks_is_lossy_and_in_front_is_not() -> None:
    lossy = lossy_blocks()
    assert not lossy.concerns("r", 0, 32)
    lossy.loaded(OWN[4:6], coded=True)
    assert not lossy.computed("r", OWN, 0, 40)
    assert not lossy.computed("r", OWN, 40, 64)
    assert lossy.computed("r", OWN, 96, 100)
    assert [lossy.any_of([block]) for block in OWN] == [False] * 4 + [True] * 3 + [False] * 3


def test_the_last_token_of_a_block_that_was_loaded_behind_lossy_ones_is_lossy() -> None:
    lossy = lossy_blocks()
    lossy.loaded(OWN[:3], coded=True)
    lossy.loaded(OWN[3:4], coded=False)
    assert lossy.concerns("r", 63, 64)
    assert lossy.computed("r", OWN, 63, 64)
    assert lossy.any_of(OWN[3:4])


def test_another_request_that_shares_lossy_blocks_inherits_that() -> None:
    lossy = lossy_blocks()
    lossy.loaded(OWN[:1], coded=True)
    assert lossy.concerns("other", 32, 33)
    assert lossy.computed("other", [*OWN[:2], 200], 32, 33)
    assert lossy.any_of([200])
    assert not lossy.concerns("other", 33, 34), "within a block, nothing changes"
    assert lossy.concerns("other", 47, 49)


def test_blocks_that_are_written_again_are_exact_again() -> None:
    lossy = lossy_blocks()
    lossy.loaded(OWN, coded=True)
    assert not lossy.computed("fresh", OWN, 0, 20)
    assert not lossy.any_of(OWN[:2])
    lossy.loaded(OWN[2:4], coded=False)
    assert not lossy.any_of(OWN[:4])
    lossy.forget("fresh")
    assert lossy.concerns("fresh", 20, 21)


def test_exact_codecs_leave_no_trace() -> None:
    lossy = LossyBlocks(Raw(), BLOCK)
    assert not lossy.loaded(OWN, coded=True)
    assert not lossy.concerns("r", 0, 99)


def test_no_lossy_block_is_shared_within_the_window() -> None:
    lossy = lossy_blocks(window=20)
    lossy.loaded(OWN[1:3], coded=True)
    assert lossy.usable_tokens(OWN[:4], prompt_tokens=100) == 64
    assert lossy.usable_tokens(OWN[:4], prompt_tokens=65) == 2 * BLOCK
    assert lossy.usable_tokens(OWN[:4], prompt_tokens=40) == 1 * BLOCK


def test_what_vllm_computes_wrongly_is_lossy_whatever_the_codec() -> None:
    lossy = LossyBlocks(Raw(), BLOCK)
    assert not lossy.computed("r", OWN, 0, 40)
    assert lossy.computed("r", OWN, 40, 41, wrong=True)
    assert lossy.concerns("r", 48, 64)
    assert lossy.computed("r", OWN, 41, 64)
    assert [lossy.any_of([block]) for block in OWN[:4]] == [False, False, True, True]
