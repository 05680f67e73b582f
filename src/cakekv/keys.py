"""Names a chunk: model fingerprint, layout, recipe, tenant and the tokens so far make its key.

A key is the BLAKE3 digest of the key before it and the chunk's own tokens; the first chunk follows the digest of an
`Identity`. So a key names every token from the beginning of the prompt, and the same everywhere: no process, machine
or library version enters into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from cakekv.errors import BadInput

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT_VERSION = 1
"""Version of the chunk format. It is part of every key, so that two versions never meet in a store."""

RAW = "raw"
"""The recipe of chunks that hold the cache as it is."""

WEIGHT_SUFFIXES = (".gguf", ".safetensors")


class ChunkKey(bytes):
    """The 32-byte name of a chunk. Two chunks share it only if any engine may use one for the other."""

    __slots__ = ()
    LENGTH = 32

    def __new__(cls, digest: bytes) -> Self:
        """Raises `BadInput` if `digest` is not 32 bytes long."""
        if len(digest) != cls.LENGTH:
            raise BadInput(f"a chunk key has {cls.LENGTH} bytes, not {len(digest)}")
        return super().__new__(cls, digest)

    @property
    def short(self) -> str:
        """The first 12 hexadecimal digits, for messages."""
        return self.hex()[:12]


@dataclass(frozen=True)
class Identity:
    """Everything besides the tokens that decides whether one engine may use another's chunks.

    Parameters
    ----------
    weights : str
        Fingerprint of the weights, from `fingerprint_files` or `fingerprint_tensors`.
    architecture : str
        The model's configuration as far as it changes keys and values (RoPE settings, normalisation, ...), `canonical`.
    dtype : str
        Element type of the cache, for example "bfloat16".
    layout : str
        Order of the bytes within a segment, `canonical`.
    chunk_tokens : int
        Tokens per chunk.
    adapter : str
        Fingerprint of the adapter in use; "" for none.
    tenant : str
        Secret salt that keeps tenants apart; "" if they share.
    recipe : str
        The lossy options under which chunks were made; "raw" for none.
    format_version : int
        Version of the chunk format.

    Raises
    ------
    BadInput
        `chunk_tokens` is not positive, or `tenant` is no text.
    """

    weights: str
    architecture: str
    dtype: str
    layout: str
    chunk_tokens: int
    adapter: str = ""
    tenant: str = ""
    recipe: str = RAW
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise BadInput(f"a chunk holds at least one token, not {self.chunk_tokens}")
        if not isinstance(self.tenant, str):
            raise BadInput(f'a tenant is a text ("" if all share), not a {type(self.tenant).__name__}')

    @cached_property
    def root(self) -> bytes:
        """The digest that the first chunk's key follows; 32 bytes."""
        return blake3(canonical(asdict(self)).encode(), derive_key_context="cakekv identity").digest()

    def fields(self) -> dict[str, str]:
        """All fields as text, to explain a miss; of the tenant only a short digest, because a salt is a secret."""
        fields = {name: str(value) for name, value in asdict(self).items()}
        if self.tenant:
            fields["tenant"] = blake3(
                self.tenant.encode("utf-8", "surrogatepass"), derive_key_context="cakekv tenant"
            ).hexdigest(4)
        return fields


def canonical(value: Any) -> str:
    """Stable text for plain data: JSON with sorted keys, ASCII only, without spaces.

    Raises
    ------
    BadInput
        The value is not plain data, or holds a NaN or an infinity.
    """
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise BadInput(f"only plain, finite data can be part of a key: {error}") from error


def chunk_keys(identity: Identity, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[ChunkKey]:
    """One key per full chunk of a prompt, each chained to the one before.

    Parameters
    ----------
    identity : Identity
        Whose chunks.
    token_ids : sequence of int
        The prompt from its first token on.

    Raises
    ------
    BadInput
        The token ids are not a flat sequence of integers from 0 to 2**63 - 1.
    """
    return chained_keys(identity.root, identity.chunk_tokens, token_ids)


def document_keys(identity: Identity, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[ChunkKey]:
    """One key per chunk of a document that is computed by itself, wherever it stands; the last chunk may be shorter.

    They are never those of a prompt that begins with the same tokens.

    Parameters
    ----------
    identity : Identity
        Whose chunks.
    token_ids : sequence of int
        The document from its first token on.

    Raises
    ------
    BadInput
        As for `chunk_keys`.
    """
    root = blake3(identity.root, derive_key_context="cakekv document").digest()
    return chained_keys(root, identity.chunk_tokens, token_ids, with_tail=True)


def tail_keys(parent: bytes, token_ids: Sequence[int]) -> list[ChunkKey]:
    """The key of a chunk that follows `parent` and holds the first of these tokens, the first two, and so on.

    Parameters
    ----------
    parent : bytes
        The key of the chunk before, or the identity's root.
    token_ids : sequence of int
        What may be in the chunk.
    """
    content, keys = blake3(parent), []
    for token in np.asarray(token_ids, "<i8"):
        content.update(token.tobytes())
        keys.append(ChunkKey(content.digest()))
    return keys


def truncated_root(root: bytes, chunk_tokens: int, token_ids: Sequence[int], dropped: range, turn: bool) -> bytes:
    """What the keys of a truncated prompt follow, so that its chunks, which are not exact, never serve another prompt.

    Parameters
    ----------
    root : bytes
        What the keys of the prompt follow that was truncated.
    chunk_tokens : int
        Tokens per chunk.
    token_ids : sequence of int
        That prompt.
    dropped : range
        Which of its positions were left out.
    turn : bool
        Whether the keys behind them were turned to their new positions.
    """
    *_, seen = chained_keys(root, chunk_tokens, token_ids[: dropped.stop], with_tail=True)
    how = canonical({"dropped": [dropped.start, dropped.stop], "turn": turn})
    return blake3(seen + how.encode(), derive_key_context="cakekv truncated").digest()


def chained_keys(
    root: bytes,
    chunk_tokens: int,
    token_ids: Sequence[int] | npt.NDArray[np.integer[Any]],
    with_tail: bool = False,
) -> list[ChunkKey]:
    """As `chunk_keys`, of an identity of which only the root and the tokens per chunk are known.

    `with_tail`: a last chunk that is not full has a key, too.
    """
    tokens = np.asarray(token_ids)
    if not tokens.size:
        return []
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise BadInput(f"token ids must be a flat sequence of integers, not {tokens.ndim}-d {tokens.dtype}")
    tokens = tokens.astype("<i8")
    if tokens.min() < 0:
        raise BadInput(f"token ids must be from 0 to 2**63 - 1; the one at {int(tokens.argmin())} is not")
    data = tokens.tobytes()
    step = chunk_tokens * tokens.itemsize
    keys = []
    parent = root
    for start in range(0, len(data) if with_tail else len(data) - step + 1, step):
        parent = ChunkKey(blake3(parent + data[start : start + step]).digest())
        keys.append(parent)
    return keys


def fingerprint_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], Buffer]]) -> str:
    """Fingerprint of a live model's weights: the same in whatever order its tensors come.

    Parameters
    ----------
    tensors : iterable of (name, dtype, shape, data)
        `data` is a C-contiguous buffer with the tensor's bytes. One tensor at a time is held.

    Returns
    -------
    str
        Hexadecimal.

    Raises
    ------
    BadInput
        There are no tensors.
    """
    return fingerprint_digests((name, dtype, shape, content_digest(data)) for name, dtype, shape, data in tensors)


def fingerprint_digests(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """As `fingerprint_tensors`, of tensors whose contents were read before: `content_digest` in place of the data."""
    entries = [[name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors]
    if not entries:
        raise BadInput("a model without tensors has no fingerprint")
    return blake3(canonical(sorted(entries)).encode(), derive_key_context="cakekv tensors").hexdigest()


def content_digest(data: Buffer) -> str:
    """Digest of a C-contiguous buffer's bytes, hexadecimal."""
    view = memoryview(data)
    content = blake3(max_threads=blake3.AUTO)
    if view.nbytes:  # an empty view cannot be cast
        content.update(view.cast("B"))
    return content.hexdigest()


def fingerprint_files(folder_or_file: Path) -> str:
    """Fingerprint of the weights in a file, or in all weight files of a folder: of their contents alone.

    Parameters
    ----------
    folder_or_file : Path
        A .safetensors or .gguf file, or a folder with some (its subfolders are not looked into).

    Returns
    -------
    str
        Hexadecimal.

    Raises
    ------
    BadInput
        There are no weights there, or they cannot be read.
    """
    files = [folder_or_file]
    if folder_or_file.is_dir():
        files = sorted(file for file in folder_or_file.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if not files:
            raise BadInput(f"{folder_or_file} holds no {' or '.join(WEIGHT_SUFFIXES)} files; name a model's folder")
    try:
        digests = [blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest() for file in files]
    except OSError as error:
        raise BadInput(f"the weights in {folder_or_file} cannot be read: {error}") from error
    return blake3(canonical(digests).encode(), derive_key_context="cakekv files").hexdigest()
