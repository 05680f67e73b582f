"""Keys: chained, stable everywhere, and different as soon as anything that matters differs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakekv.errors import BadInput
from cakekv.keys import (
    ChunkKey,
    Identity,
    canonical,
    chunk_keys,
    document_keys,
    fingerprint_files,
    fingerprint_tensors,
)

IDENTITY = Identity(weights="w", architecture="a", dtype="float32", layout="l", chunk_tokens=4)

tokens = st.lists(st.integers(0, 2**63 - 1), max_size=40)


def test_keys_never_change() -> None:
    """A change here makes every store in the world useless: raise the format version instead."""
    assert [key.hex() for key in chunk_keys(IDENTITY, range(8))] == [
        "f3928e24f7810655e656ed8f854de212b04f233e29e0644e47a705e496feead0",
        "854987ce18255945239f1f33fb7728c31238c6a3af9a66bc5ce6cea9a19ab196",
    ]


def test_keys_of_documents_never_change() -> None:
    assert [key.short for key in document_keys(IDENTITY, range(6))] == ["9ea121bd8ba0", "1d14e1bc75a2"]


@given(tokens, tokens)
def test_documents_have_keys_of_their_own(one: list[int], other: list[int]) -> None:
    keys = document_keys(IDENTITY, one)
    assert len(keys) == -(-len(one) // 4)
    assert set(keys).isdisjoint(chunk_keys(IDENTITY, one))
    assert (keys == document_keys(IDENTITY, other)) is (one == other)
    assert keys[: len(one) // 4] == document_keys(IDENTITY, one[: len(one) // 4 * 4]), "a tail changes nothing before"


def test_keys_are_the_same_in_another_process() -> None:
    program = (
        "from cakekv.keys import *;print(chunk_keys(Identity('w', 'a', 'float32', 'l', 4), list(range(8)))[-1].hex())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert outputs == [chunk_keys(IDENTITY, range(8))[-1].hex()] * 2


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_every_field_of_an_identity_changes_the_keys(field: Any) -> None:
    value = getattr(IDENTITY, field)
    change: dict[str, Any] = {field: value + 1 if isinstance(value, int) else value + "x"}
    other = dataclasses.replace(IDENTITY, **change)
    assert other.root != IDENTITY.root
    assert set(chunk_keys(other, range(20))).isdisjoint(chunk_keys(IDENTITY, range(20)))


def test_text_cannot_move_from_one_field_to_the_next() -> None:
    assert (
        dataclasses.replace(IDENTITY, weights="ab", architecture="c").root
        != dataclasses.replace(IDENTITY, weights="a", architecture="bc").root
    )
    assert (
        dataclasses.replace(IDENTITY, weights='a","b', adapter="").root
        != dataclasses.replace(IDENTITY, weights="a", adapter="b").root
    )


def test_the_tenant_is_not_told() -> None:
    identity = dataclasses.replace(IDENTITY, tenant="hunter2")
    assert "hunter2" not in str(identity.fields())
    assert identity.fields()["tenant"] != dataclasses.replace(IDENTITY, tenant="hunter3").fields()["tenant"]
    assert IDENTITY.fields()["tenant"] == ""
    assert set(identity.fields()) == {field.name for field in dataclasses.fields(Identity)}


@given(tokens)
def test_only_full_chunks_have_keys(token_ids: Any) -> None:
    keys = chunk_keys(IDENTITY, token_ids)
    assert len(keys) == len(token_ids) // 4
    assert len(set(keys)) == len(keys)


@given(tokens, tokens)
def test_keys_are_shared_as_far_as_the_tokens_are(left: Any, right: Any) -> None:
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    pairs = list(zip(chunk_keys(IDENTITY, left), chunk_keys(IDENTITY, right), strict=False))
    assert [a == b for a, b in pairs] == [index < common // 4 for index in range(len(pairs))]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16", ">i8", ">u4"])
def test_the_kind_of_sequence_does_not_matter(dtype: Any) -> None:
    assert chunk_keys(IDENTITY, np.arange(12, dtype=dtype)) == chunk_keys(IDENTITY, list(range(12)))


def test_strided_arrays_are_read_in_order() -> None:
    assert chunk_keys(IDENTITY, np.arange(24)[::2]) == chunk_keys(IDENTITY, list(range(0, 24, 2)))


@pytest.mark.parametrize(
    "token_ids", [[-1] * 4, [2**63] * 4, [2**64] * 4, [1.0] * 4, ["1"] * 4, [True] * 4, [[1, 2], [3, 4]]]
)
def test_what_is_no_token_is_refused(token_ids: Any) -> None:
    with pytest.raises(BadInput, match="token ids"):
        chunk_keys(IDENTITY, token_ids)


def test_chunks_without_tokens_are_refused() -> None:
    with pytest.raises(BadInput, match="at least one token"):
        dataclasses.replace(IDENTITY, chunk_tokens=0)


def test_a_chunk_key_is_32_bytes() -> None:
    key = ChunkKey(bytes(range(32)))
    assert key.hex().startswith(key.short)
    assert ChunkKey.fromhex(key.hex()) == key
    with pytest.raises(BadInput, match="32 bytes"):
        ChunkKey(b"short")


def test_canonical_text_is_stable() -> None:
    assert canonical({"b": (1, 2.5), "a": "é"}) == canonical({"a": "é", "b": [1, 2.5]}) == '{"a":"\\u00e9","b":[1,2.5]}'
    for value in (float("nan"), float("inf"), object(), {1: "a", "b": 2}):
        with pytest.raises(BadInput, match="plain, finite data"):
            canonical(value)


def tensors(**changes: Any) -> list[Any]:
    weights = {
        "a": np.arange(6, dtype="<f4").reshape(2, 3),
        "b": np.zeros((0, 3), "<f4"),
        "c": np.array(1.5, "<f4"),
    } | changes
    return [(name, str(array.dtype), array.shape, array) for name, array in weights.items()]


def test_tensors_in_any_order_have_one_fingerprint() -> None:
    assert fingerprint_tensors(tensors()) == fingerprint_tensors(iter(tensors()[::-1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"a": np.arange(6, dtype="<f4").reshape(3, 2)},
        {"a": np.arange(6, dtype="<f4").reshape(2, 3).view("<i4")},
        {"a": np.arange(1, 7, dtype="<f4").reshape(2, 3)},
        {"d": np.zeros(1, "<f4")},
    ],
    ids=["shape", "dtype", "bytes", "one more"],
)
def test_whatever_changes_in_a_tensor_changes_the_fingerprint(changes: Any) -> None:
    assert fingerprint_tensors(tensors(**changes)) != fingerprint_tensors(tensors())


def test_no_tensors_no_fingerprint() -> None:
    with pytest.raises(BadInput, match="without tensors"):
        fingerprint_tensors([])


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "1.safetensors").write_bytes(b"one")
    (folder / "2.safetensors").write_bytes(b"two")
    (folder / "readme.md").write_text("not weights")
    before = fingerprint_files(folder)
    (folder / "readme.md").write_text("still not weights")
    assert fingerprint_files(folder.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "2.safetensors").write_bytes(b"twO")
    assert fingerprint_files(tmp_path / "moved") != before


def test_a_single_file_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights" * 100_000)
    assert fingerprint_files(file) == fingerprint_files(tmp_path)


def test_no_weights_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"\.safetensors"):
        fingerprint_files(tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        fingerprint_files(tmp_path / "nowhere")
    (tmp_path / "missing.safetensors").symlink_to("nowhere")
    with pytest.raises(BadInput, match="cannot be read"):
        fingerprint_files(tmp_path)
