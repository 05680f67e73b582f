"""The codec that learns: what is kept of it is checked, part of every key, and needed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.numpy import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.bench.quality.documents import make_documents
from cakekv.cake import Cake
from cakekv.codec import codec_named
from cakekv.codec.base import Plane
from cakekv.codec.basis import Basis, basis_file, find_basis, read_basis, write_basis
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.kvtc import SINKS, Kvtc
from cakekv.codec.learning import Learner, Seen
from cakekv.codec.texts import learning_texts
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, CakeError, UnknownRotation
from cakekv.rotation import Rotation
from cakekv.store.memory import MemoryStore
from tests.bases import learn_model, planes_of, ready

HEAD = 15
"""Bytes of a file before its checksum."""


@pytest.fixture(scope="module")
def engine(make_engine: Callable[[str], TransformersEngine]) -> TransformersEngine:
    return make_engine("float32")


@pytest.fixture(scope="module")
def learned(engine: TransformersEngine) -> bytes:
    return basis_file(engine.identity(1).weights).read_bytes()


def stranger() -> TransformersEngine:
    """A model that nobody has learned."""
    torch.manual_seed(99)
    config = LlamaConfig(
        vocab_size=211, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3
    )
    return TransformersEngine(LlamaForCausalLM(config))


def test_without_a_basis_it_is_refused_with_the_command() -> None:
    with pytest.raises(BadInput, match="cakekv codec learn --model"):
        Cake(stranger(), store=MemoryStore(), codec="kvtc")
    engine = stranger()
    with pytest.raises(BadInput, match="cakekv codec learn --model"):
        ChunkCoder(codec_named("kvtc"), engine.layout, 32, "float32", engine.rotations)


def test_a_basis_of_another_model_is_refused(engine: TransformersEngine, learned: bytes) -> None:
    other = stranger()
    codec = Kvtc().with_basis(Basis.from_bytes(learned))
    with pytest.raises(BadInput, match="another model's"):
        ChunkCoder(codec, other.layout, 32, "float32", other.rotations)


def test_an_unknown_rotation_is_refused(engine: TransformersEngine, learned: bytes) -> None:
    def unknown() -> list[Rotation]:
        raise UnknownRotation("it changes with the prompt")

    codec = Kvtc().with_basis(Basis.from_bytes(learned))
    with pytest.raises(BadInput, match="another codec"):
        ChunkCoder(codec, engine.layout, 32, "float32", unknown)


def test_learning_twice_gives_the_same_and_other_texts_other_keys(engine: TransformersEngine, learned: bytes) -> None:
    first = Basis.from_bytes(learned)
    assert learn_model(engine).digest == first.digest
    with Cake(engine, codec="kvtc") as cake:
        root = cake.identity.root
    try:
        assert learn_model(engine, seed=5).digest != first.digest
        with Cake(engine, codec="kvtc") as cake:
            assert cake.identity.root != root
    finally:
        write_basis(learned, [basis_file(engine.identity(1).weights)])
    with Cake(engine, codec="kvtc") as cake:
        assert cake.identity.root == root


def test_more_bits_come_closer(engine: TransformersEngine) -> None:
    prompt = random.Random(8).choices(range(211), k=330)
    exact, away, sizes = None, [], []
    for bits in (0.5, 2, 6):
        store = MemoryStore()
        with Cake(engine, store=store, chunk_tokens=32, codec=f"kvtc:bits={bits}") as one:
            exact = one.prefill(prompt)
            one.wait_saved()
            sizes.append(sum(chunk.size for chunk in store))
        with Cake(engine, store=store, chunk_tokens=32, codec=f"kvtc:bits={bits}") as other:
            restored = other.prefill(prompt, mode="load")
        assert restored.report.lossy_tokens == 320
        away.append(float((restored.logits - exact.logits).abs().mean()))
        for mine, theirs in zip(restored.cache.stored, exact.cache.stored, strict=True):
            for region, expected in zip(mine.regions, theirs.regions, strict=True):
                assert torch.equal(region[:, :SINKS], expected[:, :SINKS])
    assert sizes == sorted(sizes)
    assert away[0] > 1.2 * away[1] > 5 * away[2]


def test_tokens_that_are_far_out_stay_exact() -> None:
    plane = Plane("values", 0, 1, 2, 40, 16, "float32", start=640)
    codec = ready(Kvtc(), [plane])
    values = np.random.default_rng(0).standard_normal(plane.shape).astype(np.float32)
    values[:, 7] *= 1e9
    code = np.empty(codec.size(plane), np.uint8)
    used = codec.encode(plane, values, code)
    back = np.empty_like(values)
    codec.decode(plane, [code[:used]], back)
    assert np.array_equal(back[:, 7], values[:, 7])
    assert not np.array_equal(back[:, 8], values[:, 8])
    assert used < plane.raw_bytes / 2
    usual = np.empty(codec.size(plane), np.uint8)
    assert codec.encode(plane, values * 1e20, usual) <= codec.size(plane)  # all are


def test_what_matters_gets_the_bits() -> None:
    rng, learner = np.random.default_rng(4), Learner()
    gradients = rng.standard_normal((1, 500, 8)).astype(np.float32)
    gradients[..., 4:] *= 1e-3
    learner.see("values", 0, Seen(rng.standard_normal((1, 500, 8)).astype(np.float32), gradients))
    codec = Kvtc().with_basis(Basis.from_bytes(learner.basis().to_bytes()))
    plane = Plane("values", 0, 1, 1, 64, 8, "float32", start=64)
    values = rng.standard_normal(plane.shape).astype(np.float32)
    code, back = np.empty(codec.size(plane), np.uint8), np.empty_like(values)
    codec.decode(plane, [code[: codec.encode(plane, values, code)]], back)
    error = np.abs(back - values).mean((0, 1))
    assert error[:4].max() < error[4:].min()


def test_bits_beyond_what_was_learned_are_refused(learned: bytes) -> None:
    coarse = Basis.from_bytes(tampered(learned, "rates", lambda table: np.linspace(0.5, 3, table.size)))
    for bits in (0.25, 6):
        with pytest.raises(BadInput, match=f"bits is {bits}, .* from 0.5 to 3"):
            Kvtc(bits=bits).with_basis(coarse)
    with pytest.raises(BadInput, match="must be from"):
        Kvtc(bits=0)


def tampered(learned: bytes, name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A file with another table, and the right checksum."""
    tables = load(learned[HEAD + 32 :])
    tables[name] = np.ascontiguousarray(change(tables[name].copy()))
    body = save(tables)
    return learned[:HEAD] + blake3(body).digest() + body


def test_hostile_files_are_refused_by_name(engine: TransformersEngine, learned: bytes, tmp_path: Path) -> None:
    body = b"\xff" * 64
    bad = {
        "empty": b"",
        "cut": learned[:-9],
        "flipped": learned[:-9] + bytes([learned[-9] ^ 1]) + learned[-8:],
        "no basis": b"x" * 5000,
        "no tables": learned[:HEAD] + blake3(body).digest() + body,
        "not finite": tampered(learned, "keys.1.mean", lambda table: table * np.float32("inf")),
        "no number": tampered(learned, "values.0.spread", lambda table: table * np.float32("nan")),
        "other shape": tampered(learned, "keys.0.rows", lambda table: table[:, :-1]),
        "other type": tampered(learned, "keys.0.mean", lambda table: table.astype(np.float64)),
        "no scale": tampered(learned, "keys.0.scale", lambda table: table * 0),
        "steps": tampered(learned, "steps", lambda table: table[::-1]),
        "rates": tampered(learned, "rates", lambda table: table[:1]),
    }
    for name, data in bad.items():
        file = tmp_path / f"{name}.basis"
        file.write_bytes(data)
        with pytest.raises(BadInput, match=r"basis .*cannot be used: .*cakekv codec learn"):
            read_basis(file)
    place = basis_file(engine.identity(1).weights)
    try:
        place.write_bytes(bad["flipped"])
        with pytest.raises(BadInput, match="checksum"):
            Cake(engine, codec="kvtc")
    finally:
        write_basis(learned, [place])
    pipe = tmp_path / "pipe.basis"
    os.mkfifo(pipe)
    with pytest.raises(BadInput, match="cannot be used"):
        read_basis(pipe)


def test_a_singular_basis_is_refused(engine: TransformersEngine, learned: bytes) -> None:
    codec = Kvtc().with_basis(Basis.from_bytes(tampered(learned, "values.0.rows", lambda table: table * 0)))
    plane = next(plane for plane in planes_of(engine.layout) if plane.role == "values")
    values = np.zeros(plane.shape, np.float32)
    with pytest.raises(BadInput, match="cannot be used"):
        codec.encode(plane, values, np.empty(codec.size(plane), np.uint8))


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CakeError, match="CAKEKV_CACHE"):
        write_basis(b"", [tmp_path / "file" / "basis"])


def test_files_and_the_model_made_of_them_share_a_basis(engine: TransformersEngine, tmp_path: Path) -> None:
    engine.model.save_pretrained(tmp_path)
    first = TransformersEngine.from_pretrained(tmp_path, dtype="float32")
    basis = learn_model(first)
    again = TransformersEngine.from_pretrained(tmp_path, dtype="bfloat16")
    assert again.identity(1).weights != first.identity(1).weights
    assert find_basis(again.weights_names()).digest == basis.digest


class Characters:
    """A tokenizer."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_what_is_learned_from_is_not_what_is_judged_by() -> None:
    def pieces(text: list[int]) -> set[str]:
        return set("".join(map(chr, text)).split("\n\n"))

    judged = set[str]().union(*(pieces(document.context) for document in make_documents(Characters(), 24, 5000, 400)))
    texts = list(learning_texts(Characters(), 12, 5000))
    assert [len(text) for text in texts] == [5000] * 12
    assert texts == list(learning_texts(Characters(), 12, 5000))
    shared = {piece for text in texts for piece in pieces(text) & judged if len(piece) > 80}
    assert shared == set()
    with pytest.raises(BadInput, match="not enough text"):
        list(learning_texts(Characters(), 100, 10**6))
