"""Stores that do not take the heads of prompts."""

from __future__ import annotations

from typing import Any

import pytest

from cakekv.chunk import peek_place
from cakekv.errors import BadInput
from cakekv.store.base import Store
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.tail_only import TailOnlyStore
from cakekv.store.unread_heads import UnreadHeadsStore

from ..chunks import SHAPE, chunk_of, key_of


def test_heads_are_declined() -> None:
    store = open_store("memory://?skip_head=40")
    assert isinstance(store, TailOnlyStore)
    kept = [position for position in range(0, 80, 16) if store.write(key_of(position), chunk_of(position, position))]
    assert kept == [32, 48, 64], "a chunk that ends behind the head is kept"
    assert store.stats().chunks == 3
    with pytest.raises(BadInput, match="whole number"):
        open_store("memory://?skip_head=some")
    assert isinstance(open_store("memory://?skip_head=auto"), UnreadHeadsStore)
    with pytest.raises(BadInput, match="at least 0"):
        TailOnlyStore(MemoryStore(), -1)


def test_a_place_is_read_from_headers_only() -> None:
    assert peek_place(chunk_of(0, 512)) == (512, SHAPE.tokens)
    assert peek_place(b"") == peek_place(bytes(200)) == peek_place(chunk_of(0, 512)[1:]) == (0, 1)


def visit(store: Store, prompt: Any, loaded: Any, chunks: int = 20) -> list[Any]:
    """Look a prompt up, read some of what is there, write what is not. Returns the chunks that were taken."""
    keys = [key_of((prompt, chunk)) for chunk in range(chunks)]
    found = store.lookup(keys)
    for chunk in loaded:
        if found[chunk] is not None:
            store.open(keys[chunk]).close()
    return [c for c in range(chunks) if found[c] is None and store.write(keys[c], chunk_of(c, 16 * c))]


def test_what_restores_do_not_read_is_not_written_any_more() -> None:
    store = UnreadHeadsStore(MemoryStore())
    head, tail = range(8), range(8, 20)
    for prompt in range(32):
        assert visit(store, prompt, tail) == list(range(20)), "until enough is known, everything is written"
        visit(store, prompt, tail)
    for prompt in range(32, 200):
        visit(store, prompt, tail)
        visit(store, prompt, tail)
    assert [part for part in range(20) if store.declines(part)] == list(head)
    taken = [visit(store, prompt, tail) for prompt in range(200, 264)]
    assert all(set(tail) <= set(chunks) for chunks in taken)
    assert sum(chunks == list(range(20)) for chunks in taken) == 4, "a few are taken whole, to notice a change"
    assert sum(chunks == list(tail) for chunks in taken) == 60
    for prompt in range(300, 1500):  # the tier has become faster: everything there is read
        visit(store, prompt, range(20))
        store.lookup([key_of(0), key_of(1)])  # someone else's prompt, so that probes meet first visits, too
        visit(store, prompt, range(20))
        if not any(map(store.declines, range(20))):
            break
    else:
        raise AssertionError("it did not notice")


def test_chunks_that_were_not_looked_up_are_written() -> None:
    store = UnreadHeadsStore(MemoryStore())
    for prompt in range(400):
        visit(store, prompt // 2, range(8, 20))
    assert store.declines(0)
    assert all(store.write(key_of(number), chunk_of(number)) for number in range(50))
    store.lookup([key_of(77)])  # one alone says nothing about a prompt
    assert store.write(key_of(77), chunk_of(77))
