"""Why a prompt was missed: where its chunks are, what became of them, whose are there instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cakekv.errors import BadInput, StoreError
from cakekv.keys import ChunkKey, Identity, canonical, chunk_keys
from cakekv.store.base import Removal, Store
from cakekv.store.disk import DiskStore
from cakekv.store.maintenance.explain import explain_prompt, prompt_keys
from cakekv.store.memory import MemoryStore
from cakekv.store.tail_only import TailOnlyStore
from cakekv.store.wrapper import WrappedStore

MINE = Identity("w" * 64, "{}", "float32", canonical(["layers"]), 4)
TOKENS = list(range(18))
DATA = memoryview(bytes(5000))


def save(store: Store, identity: Identity, count: int | None = None) -> None:
    for key in chunk_keys(identity, TOKENS)[:count]:
        store.write(key, DATA)
    store.remember_identity(identity.root.hex(), identity.fields())


def explained(*tiers: Store, identity: Identity = MINE) -> Any:
    return explain_prompt(identity.root, identity.fields(), TOKENS, tiers)


def test_the_keys_are_those_of_the_engine() -> None:
    assert prompt_keys(MINE.root, MINE.fields(), TOKENS) == chunk_keys(MINE, TOKENS)


def test_where_each_chunk_is(tmp_path: Path) -> None:
    memory, disk = MemoryStore(), DiskStore(tmp_path / "kv")
    save(disk, MINE)
    save(memory, MINE, 2)
    found = explained(memory, disk)
    assert [chunk.tiers for chunk in found.chunks] == [["memory", "disk"]] * 2 + [["disk"]] * 2
    assert [(chunk.start, chunk.tokens) for chunk in found.chunks] == [(0, 4), (4, 4), (8, 4), (12, 4)]
    assert (found.prompt_tokens, found.chunk_tokens, found.known) == (18, 4, True)
    assert (found.others, found.notes) == ([], [])
    assert all(not chunk.reasons for chunk in found.chunks)


def test_what_became_of_those_that_are_gone(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path / "kv", 3 * len(DATA))
    save(disk, MINE)
    keys = chunk_keys(MINE, TOKENS)
    disk.delete([keys[1]])
    first, second, third, _ = explained(disk).chunks
    assert [reason.partition(" at ")[0] for reason in first.reasons + second.reasons] == [
        "evicted from disk",
        "deleted on request from disk",
    ]
    assert third.tiers == ["disk"]
    never = explained(disk, identity=replace(MINE, tenant="other")).chunks[0]
    assert (never.tiers, never.reasons) == ([], [])


def test_heads_that_are_never_kept() -> None:
    store = TailOnlyStore(MemoryStore(), 8)
    store.remember_identity(MINE.root.hex(), MINE.fields())
    assert [chunk.reasons for chunk in explained(store).chunks] == [["never kept: skip_head=8"]] * 2 + [[]] * 2


def test_a_server_does_not_tell() -> None:
    class Server(WrappedStore):
        def removals(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, Removal] | None:
            return None

    assert "decide" in explained(Server(MemoryStore())).notes[0]


def test_a_tier_that_fails_is_named() -> None:
    class Failing(WrappedStore):
        def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
            raise StoreError("nobody answers")

    memory = MemoryStore()
    save(memory, MINE)
    found = explained(Failing(MemoryStore()), memory)
    assert [chunk.tiers for chunk in found.chunks] == [["memory"]] * 4
    assert "nobody answers" in found.notes[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "bfloat16"), ("weights", "v" * 64), ("tenant", "secret"), ("recipe", "int8"), ("adapter", "lora")],
)
def test_the_field_that_differs_is_named_and_no_salt_shown(field: str, value: str) -> None:
    store = MemoryStore()
    change: dict[str, Any] = {field: value}
    save(store, replace(MINE, **change))
    save(store, replace(MINE, dtype="float16", layout="other", recipe="int4"), 0)
    found = explained(store)
    assert not found.known
    nearest = found.others[0]
    assert list(nearest.differs) == [field]
    assert (nearest.differs[field][1] == value) == (field != "tenant")
    assert [other.chunks for other in found.others] == [4, 0]
    assert "secret" not in repr(found)


def test_other_chunk_lengths_are_looked_for_in_their_own_way() -> None:
    store = MemoryStore()
    save(store, replace(MINE, chunk_tokens=6))
    [other] = explained(store).others
    assert other.differs == {"chunk_tokens": ("4", "6")}
    assert other.chunks == 3


def test_a_known_identity_is_compared_only_with_those_that_have_the_prompt() -> None:
    store = MemoryStore()
    save(store, MINE, 0)
    save(store, replace(MINE, dtype="float16"), 0)
    assert explained(store).others == []
    save(store, replace(MINE, dtype="float16"), 1)
    assert [other.chunks for other in explained(store).others] == [1]


def test_keys_that_vllm_makes_cannot_be_made_here() -> None:
    store = MemoryStore()
    theirs = replace(MINE, layout=canonical({"engine": "vllm"}))
    save(store, theirs, 0)
    assert explained(store).others[0].chunks is None
    with pytest.raises(BadInput, match="another engine"):
        explained(store, identity=theirs)


@pytest.mark.parametrize(
    "note", [{}, {"chunk_tokens": "0"}, {"chunk_tokens": "9" * 99}, {"chunk_tokens": "4", "layout": "[" * 9999}]
)
def test_strange_notes_do_no_harm(note: dict[str, str]) -> None:
    store = MemoryStore()
    store.remember_identity("ab" * 32, note)
    assert len(explained(store).chunks) == 4
