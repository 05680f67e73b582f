"""Ten thousand damages, flipped bits and cuts, to chunks in every form in which they are stored: all are found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from cakekv.chunk import ChunkShape, seal, segments, verify_chunk
from cakekv.codec import CODECS, codec_named
from cakekv.codec.coder import ChunkCoder
from cakekv.errors import CorruptChunk, StoreError
from cakekv.keys import ChunkKey
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout
from cakekv.rotation import Rotation
from cakekv.store.encrypted import EncryptedStore
from cakekv.store.keyring import Keyring
from cakekv.store.memory import MemoryStore
from tests.bases import planes_of, ready
from tests.store.chunks import read

DAMAGES, LONG_DAMAGES = 4_000, 10_000
KEY, POSITION = ChunkKey(bytes(range(32))), 128
ROTATION = Rotation(tuple(10000.0 ** (-pair / 8) for pair in range(8)))
LAYOUT = KVLayout(tuple(LayerLayout((PlaneLayout(2, 16, 4), PlaneLayout(2, 16, 4))) for _ in range(3)))


def encrypted(chunk: bytes) -> bytes:
    inner = MemoryStore()
    EncryptedStore(inner, Keyring([bytes(32)])).write(KEY, memoryview(chunk))
    return read(inner, KEY)


def opened(sealed: bytes) -> bytes:
    inner = MemoryStore()
    inner.write(KEY, memoryview(sealed))
    return read(EncryptedStore(inner, Keyring([bytes(32)])), KEY)


def forms() -> Iterator[tuple[str, bytes]]:
    """A chunk in every form, by its name."""
    exact = ChunkCoder(codec_named("raw"), LAYOUT, 32, "float32").exact
    chunk = bytearray(exact.total_bytes)
    rng = np.random.default_rng(1)
    for segment in segments(exact, memoryview(chunk)):
        segment[:] = rng.standard_normal(len(segment) // 4).astype(np.float32).tobytes()
    seal(exact, memoryview(chunk), KEY, POSITION)
    yield "raw", bytes(chunk)
    yield "encrypted raw", encrypted(bytes(chunk))
    long = ChunkShape(1, (40_000,) * 200)  # a header of several blocks
    many = bytearray(rng.bytes(long.total_bytes))
    seal(long, memoryview(many), KEY, POSITION)
    yield "many layers", bytes(many)
    yield "encrypted many layers", encrypted(bytes(many))  # several blocks, and tags of more than one
    for name in CODECS.keys() - {"raw"}:
        coder = ChunkCoder(ready(codec_named(name), planes_of(LAYOUT)), LAYOUT, 32, "float32", lambda: [ROTATION] * 3)
        coded = coder.encode(memoryview(chunk), memoryview(bytearray(exact.total_bytes)), KEY, POSITION)
        assert coded is not None
        yield name, bytes(coded)
        yield f"encrypted {name}", encrypted(bytes(coded))


def is_found(name: str, damaged: bytes) -> bool:
    try:
        plain = opened(damaged) if name.startswith("encrypted") else damaged
        verify_chunk(memoryview(plain))
    except (CorruptChunk, StoreError):
        return True
    return False


def damage(chunk: bytes, choose: random.Random) -> tuple[bytes, str]:
    """One bit flipped, in the whole or in its header or padding; or cut, anywhere or where a block ends."""
    kind = choose.random()
    if kind < 0.8:
        within = len(chunk) if kind < 0.5 else min(len(chunk), 4096)
        place = choose.randrange(8 * within)
        flipped = bytearray(chunk)
        flipped[place // 8] ^= 1 << place % 8
        return bytes(flipped), f"bit {place}"
    end = choose.randrange(len(chunk)) if kind < 0.95 else choose.randrange(len(chunk) // 4096) * 4096
    return chunk[:end], f"cut at {end}"


@pytest.mark.timeout(300)
def test_every_damage_is_found(long: bool) -> None:
    seed, damages = random.randrange(10**6), LONG_DAMAGES if long else DAMAGES
    choose = random.Random(seed)
    chunks = dict(forms())
    for name, chunk in chunks.items():
        assert not is_found(name, chunk), f"{name}: the undamaged chunk is sound"
    small = [name for name, chunk in chunks.items() if len(chunk) < 200_000]
    missed, done = [], Counter[str]()
    for number in range(damages):
        name = choose.choice(list(chunks) if number % 20 == 0 else small)
        damaged, what = damage(chunks[name], choose)
        done[name] += 1
        if not is_found(name, damaged):
            missed.append((name, what))
    print(f"seed {seed}: {dict(done)}")
    assert set(done) == set(chunks)
    assert not missed, f"seed {seed}: {len(missed)} of {damages} were not found, such as {missed[:5]}"
