"""Encryption at rest: wraps a store and seals every chunk with AES-256-GCM.

    offset 0      magic, version, block length, length of the chunk, name of the key, salt
    offset 48     the tag of each block (16 bytes), then zeros up to a multiple of 4096
    ...           the chunk, encrypted block by block, each block as long as it was

A key of its own seals each chunk each time it is written, derived from a key of the keyring, the salt and the chunk's
key; so a block's number will do as its nonce. Authenticated with each block: the chunk's key, which names model, tenant
and position, the block's number, which is its place in the chunk and so its layers', lengths and version. Blocks are
opened on their own, so that parts of a chunk can be read; offsets stay multiples of 4096, for direct reads.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cakekv.chunk import ALIGNMENT
from cakekv.errors import ChunkFault, CorruptChunk, UnknownKey
from cakekv.keys import ChunkKey
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats
from cakekv.store.keyring import ID_BYTES, Keyring
from cakekv.store.sizes import Sizes, doubt_of
from cakekv.store.wrapper import WrappedStore

MAGIC = b"\x89CAKESEA"
VERSION = 1
BLOCK_BYTES = 128 << 10
_TAG_BYTES = 16
_MAX_BYTES = 1 << 40

_PROLOGUE = struct.Struct(f"<8sIIQ{ID_BYTES}s16s")
_BOUND = struct.Struct("<IIQQ")


class EncryptedStore(WrappedStore):
    """Another store whose chunks nobody reads, or changes unnoticed, without the keys.

    What shows: how many chunks there are, how large, when they are used, and the identities (models, settings, a digest
    of the tenant's salt). Whoever may write to the store can still remove chunks, or put back older ones.

    Parameters
    ----------
    inner : Store
        Where the sealed chunks go.
    keyring : Keyring
        The keys.
    """

    def __init__(self, inner: Store, keyring: Keyring) -> None:
        super().__init__(inner)
        self._keyring = keyring

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        sealed = self._inner.lookup(keys)
        plain = [None if size is None else _plain_bytes(size) for size in sealed]
        doubt = doubt_of(sealed)
        return plain if doubt is None else Sizes(plain, doubt)

    def open(self, key: ChunkKey) -> ChunkReader:
        reader = self._inner.open(key)
        try:
            return _EncryptedReader(reader, key, self._keyring)
        except BaseException:
            reader.close()
            raise

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        start = _data_offset(len(data), BLOCK_BYTES)
        sealed = memoryview(bytearray(start + len(data)))
        salt = os.urandom(16)
        _PROLOGUE.pack_into(sealed, 0, MAGIC, VERSION, BLOCK_BYTES, len(data), self._keyring.newest, salt)
        data_key = self._keyring.data_key(self._keyring.newest, salt + key)
        assert data_key is not None
        for block, offset in enumerate(range(0, len(data), BLOCK_BYTES)):
            plain = data[offset : offset + BLOCK_BYTES]
            encryptor = Cipher(algorithms.AES256(data_key), modes.GCM(_nonce(block))).encryptor()
            encryptor.authenticate_additional_data(_bound(key, BLOCK_BYTES, len(data), block))
            encryptor.update_into(plain, sealed[start + offset : start + offset + len(plain)])
            encryptor.finalize()
            tag = _PROLOGUE.size + block * _TAG_BYTES
            sealed[tag : tag + _TAG_BYTES] = encryptor.tag
        return self._inner.write(key, sealed)

    def is_current(self, key: ChunkKey) -> bool:
        """Whether a chunk is sealed with the newest key; not if it lies in the open.

        Raises
        ------
        MissingChunk
            It is not stored.
        """
        with self._inner.open(key) as reader:
            head = memoryview(bytearray(_PROLOGUE.size))
            reader.read_into(head, 0)
        magic, *_, name, _ = _PROLOGUE.unpack_from(head)
        return bool(magic == MAGIC and name == self._keyring.newest)

    def __iter__(self) -> Iterator[StoredChunk]:
        for chunk in self._inner:
            if chunk.fault:
                yield chunk
            elif size := _plain_bytes(chunk.size):
                yield chunk._replace(size=size)
            else:
                yield chunk._replace(size=0, fault=f"no sealed chunk has {chunk.size} bytes")

    def stats(self) -> StoreStats:
        """See `Store`; bytes are those of the sealed chunks."""
        return self._inner.stats()


class _EncryptedReader(ChunkReader):
    """Opens blocks in place where whole ones are wanted, and keeps the last one that was wanted in part."""

    def __init__(self, inner: ChunkReader, key: ChunkKey, keyring: Keyring) -> None:
        head = memoryview(bytearray(min(ALIGNMENT, inner.size)))
        if inner.read_into(head, 0) < _PROLOGUE.size:
            raise _damaged(key, "it has no prologue")
        magic, version, self._block_bytes, self.size, name, salt = _PROLOGUE.unpack_from(head)
        if (magic, version) != (MAGIC, VERSION):
            raise _damaged(key, "it is not sealed, or in another version")
        in_range = 0 < self.size < _MAX_BYTES and self._block_bytes == BLOCK_BYTES
        if not in_range or _data_offset(self.size, self._block_bytes) + self.size != inner.size:
            raise _damaged(key, "its lengths disagree")
        data_key = keyring.data_key(name, salt + key)
        if data_key is None:
            raise UnknownKey(f"chunk {key.short}… is sealed with a key that is not in the keyring; add the key to it")
        self.slice_bytes = max(inner.slice_bytes // self._block_bytes, 1) * self._block_bytes
        self._inner = inner
        self._key = key
        self._data_key = data_key
        self._start = _data_offset(self.size, self._block_bytes)
        self._tags = head
        if self._start > len(head):
            self._tags = memoryview(bytearray(self._start))
            inner.read_into(self._tags, 0)
        used = _PROLOGUE.size + -(-self.size // self._block_bytes) * _TAG_BYTES
        if bytes(self._tags[used : self._start]) != bytes(self._start - used):
            raise _damaged(key, "the bytes behind its tags are not zero")
        self._kept: tuple[int, memoryview] | None = None

    def announce(self, start: int, end: int) -> None:
        first, last = start // self._block_bytes, -(-end // self._block_bytes)
        self._inner.announce(*(self._start + min(block * self._block_bytes, self.size) for block in (first, last)))

    def read_into(self, buffer: memoryview, offset: int) -> int:
        end = min(offset + len(buffer), self.size)
        done = offset
        while done < end:
            block, skipped = divmod(done, self._block_bytes)
            whole = end - done if end == self.size else (end - done) // self._block_bytes * self._block_bytes
            part = buffer[done - offset :]
            if not skipped and whole > 0:
                self._open_blocks(block, part[:whole])
                done += whole
                continue
            plain = self._keep(block)[skipped : skipped + end - done]
            part[: len(plain)] = plain
            done += len(plain)
        return max(0, end - offset)

    def close(self) -> None:
        self._inner.close()

    def _keep(self, block: int) -> memoryview:
        if self._kept is None or self._kept[0] != block:
            plain = memoryview(bytearray(min(self._block_bytes, self.size - block * self._block_bytes)))
            self._open_blocks(block, plain)
            self._kept = block, plain
        return self._kept[1]

    def _open_blocks(self, block: int, buffer: memoryview) -> None:
        """Fill `buffer` with whole blocks from `block` on."""
        if self._inner.read_into(buffer, self._start + block * self._block_bytes) < len(buffer):
            raise _damaged(self._key, "it ends too soon")
        for offset in range(0, len(buffer), self._block_bytes):
            part = buffer[offset : offset + self._block_bytes]
            number = block + offset // self._block_bytes
            at = _PROLOGUE.size + number * _TAG_BYTES
            mode = modes.GCM(_nonce(number), bytes(self._tags[at : at + _TAG_BYTES]))
            decryptor = Cipher(algorithms.AES256(self._data_key), mode).decryptor()
            decryptor.authenticate_additional_data(_bound(self._key, self._block_bytes, self.size, number))
            decryptor.update_into(part, part)
            try:
                decryptor.finalize()
            except InvalidTag:
                part[:] = bytes(len(part))
                raise _damaged(self._key, f"block {number}") from None


def _damaged(key: ChunkKey, detail: str) -> CorruptChunk:
    return CorruptChunk(ChunkFault.SEAL, f"{detail} (chunk {key.short}…)")


def _nonce(block: int) -> bytes:
    return block.to_bytes(12, "little")


def _bound(key: ChunkKey, block_bytes: int, size: int, block: int) -> bytes:
    return key + _BOUND.pack(VERSION, block_bytes, size, block)


def _data_offset(size: int, block_bytes: int) -> int:
    """Where the blocks of a chunk of `size` bytes begin."""
    blocks = -(-size // block_bytes)
    return -(-(_PROLOGUE.size + blocks * _TAG_BYTES) // ALIGNMENT) * ALIGNMENT


def _plain_bytes(sealed: int) -> int | None:
    """Length of the chunk in `sealed` bytes; None if no chunk has that length when sealed."""
    about = _data_offset(sealed * BLOCK_BYTES // (BLOCK_BYTES + _TAG_BYTES), BLOCK_BYTES)
    for start in (about, about - ALIGNMENT, about + ALIGNMENT):
        if sealed > start and _data_offset(sealed - start, BLOCK_BYTES) == start:
            return sealed - start
    return None
