"""Every error cakekv raises on purpose. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from cakekv.messages import said

if TYPE_CHECKING:
    from cakekv.keys import ChunkKey


class CakeError(Exception):
    """Base of all errors raised by cakekv. Whatever its message is made of, what is shown of it is `said`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(said(message))


class BadInput(CakeError, ValueError):
    """The caller asked for something that cannot be done: an empty prompt, an unknown mode, a malformed size."""


class CakeClosed(BadInput):
    """A `Cake` is asked for something after `close`."""


class PromptTooLong(BadInput):
    """A prompt has more tokens than the model's context."""


class BadOption(BadInput):
    """An option of the vLLM plug-in is unknown, or has a value that it cannot have."""


class UnsupportedEngine(CakeError):
    """vLLM, or transformers, is a version that cakekv cannot work with, or set up in such a way."""


class UnsupportedModel(CakeError):
    """The model keeps state that cannot be cut into per-token chunks (state-space layers, encoder-decoders, ...)."""


class UnknownRotation(CakeError):
    """How a model turns its keys by their positions cannot be told, or changes with the prompt."""


class StoreError(CakeError):
    """A tier could not be opened, read or written."""


class NoAnswer(StoreError):
    """A tier has not answered in time, or cannot be reached: what else it is asked for now will fare no better."""


class OutOfReach(StoreError):
    """One chunk cannot be had, since what holds it does not answer; the rest of the tier does."""


class TierDown(NoAnswer):
    """A tier of a tiered store is known to be down, and is not asked."""


class NotDeleted(StoreError):
    """Some chunks could not be deleted; all others that were to go are gone.

    Parameters
    ----------
    message : str
        Which, and why.
    deleted : int
        How many chunks are gone.
    left : mapping of ChunkKey to str, or None
        Those that are not, as far as that is known, each with the reason.
    """

    def __init__(self, message: str, deleted: int = 0, left: Mapping[ChunkKey, str] | None = None) -> None:
        super().__init__(message)
        self.deleted = deleted
        self.left = dict(left or {})

    @classmethod
    def of(cls, deleted: int, left: Mapping[ChunkKey, str]) -> NotDeleted:
        """Make the message of `left`."""
        key, reason = next(iter(left.items()))
        message = f"cannot delete {len(left):,} of {deleted + len(left):,} chunks: {key.short}…: {reason}"
        return cls(message, deleted, left)


class StoreFull(StoreError):
    """A chunk does not fit: it is larger than the capacity, or the device behind the tier has no room left."""


class MissingChunk(StoreError):
    """The chunk is not (or no longer) in the tier."""


class CannotPin(StoreError):
    """The tier does not decide what it evicts, so it can promise nothing."""


class PinRefused(StoreError):
    """Pins would take up more of the tier than they may."""


class UnknownKey(StoreError):
    """The chunk is sealed with a key that is not in the keyring."""


class CannotUnpack(StoreError):
    """The chunk is packed, and what unpacks it is not installed."""


class ReadOnly(StoreError):
    """The tier can be loaded from, but not written to."""


class Unreadable(StoreError):
    """The chunk is stored, but this user may not read it: nothing is wrong with the tier."""


class CannotEncode(CakeError):
    """A chunk's keys or values are such that no codec can encode them; it is not saved."""


class CacheRewritten(CakeError):
    """A part of a cache that was to be saved was written to before it was; it is not saved."""


class ChunkFault(Enum):
    """Every way in which the bytes of a chunk can be untrustworthy."""

    TRUNCATED = "the file ends before the header says it should"
    OVERLONG = "the file goes on after the header says it ends"
    BAD_MAGIC = "this is not a cakekv chunk"
    UNSUPPORTED_VERSION = "the chunk has a format version that this cakekv does not read"
    HEADER_OUT_OF_RANGE = "a count or length in the header is out of range"
    HEADER_CHECKSUM = "the header does not match its checksum"
    SEGMENT_MISPLACED = "a segment overlaps another, is misaligned, or lies outside the file"
    WRONG_KEY = "the chunk belongs to another key"
    WRONG_POSITION = "the chunk belongs to another position"
    WRONG_SHAPE = "the chunk has another shape (tokens, layers or segment lengths) than this model's"
    SEGMENT_CHECKSUM = "a segment does not match its checksum"
    SEAL = "the encrypted chunk does not match its seal"
    UNDECODABLE = "a segment is not what its codec writes"
    DIRTY_PADDING = "bytes between two segments, or behind the header, are not zero"


class CorruptChunk(CakeError):
    """A chunk whose bytes cannot be trusted.

    Parameters
    ----------
    fault : ChunkFault
        Which check failed.
    detail : str
        Where, with the values that disagree.
    """

    def __init__(self, fault: ChunkFault, detail: str = "") -> None:
        self.fault = fault
        self.detail = detail
        super().__init__(f"{fault.value}" + (f": {detail}" if detail else ""))
