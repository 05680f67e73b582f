"""Buffers that failed transfers may still use: kept for long enough, and not without bound."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest

from cakekv.errors import StoreError
from cakekv.store import buffers
from cakekv.store.buffers import Buffer, KeptBuffers


def test_a_buffer_is_where_it_says() -> None:
    buffer = Buffer(1000)
    buffer.view[:] = bytes(range(250)) * 4
    assert ctypes.string_at(buffer.address, 1000) == bytes(buffer.view)


def test_what_is_kept_outlives_who_kept_it_until_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptBuffers()
    buffer = Buffer(10)
    kept.keep(buffer)
    alive = weakref.ref(kept)
    del kept
    gc.collect()
    assert alive() is not None
    assert alive().take_old() == []
    assert alive().__len__() == 1
    monkeypatch.setattr(buffers, "KEPT_S", -1.0)
    assert alive().take_old() == [buffer]
    gc.collect()
    assert alive() is None


def test_no_more_transfers_while_too_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MAX_KEPT_BYTES", 100)
    kept = KeptBuffers()
    kept.keep(Buffer(100))
    kept.check()
    kept.keep(Buffer(1))
    with pytest.raises(StoreError, match="may still use 101 B"):
        kept.check()
    monkeypatch.setattr(buffers, "KEPT_S", -1.0)
    kept.take_old()
    kept.check()
