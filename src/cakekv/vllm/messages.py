"""What scheduler and workers tell each other: orders with every step, reports with every step's output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from cakekv.keys import ChunkKey


class Source(NamedTuple):
    """Tokens of a stored chunk that are wanted elsewhere."""

    key: ChunkKey
    position: int
    """Of the chunk's first token, in the document that it was computed in."""
    begin: int
    end: int
    """The tokens wanted, counted from the chunk's first."""
    again: bool = False
    """Whether another load of the same prompt wants some of it, too."""


class LoadOrder(NamedTuple):
    """Load a chunk into these blocks."""

    number: int
    """Names the load; never used again."""
    tier: int
    key: ChunkKey
    start: int
    """Position of the chunk's first token."""
    block_ids: tuple[int, ...]
    group: int | None = None
    """Load only this group of layers; None: all."""
    sources: tuple[Source, ...] = ()
    """Of a document: what is cut out of one or two of its chunks, in place of the chunk of that key."""


class SaveOrder(NamedTuple):
    """Save these blocks as a chunk; they are complete after this step's forward pass."""

    key: ChunkKey
    start: int
    block_ids: tuple[int, ...]
    exact: bool
    """Whether it is to be stored as it is, whatever the codec."""


@dataclass
class StepOrders(KVConnectorMetadata):
    """From the scheduler to every worker, with every step.

    Once a worker has taken them in, no cancelled load writes into the cache any more.
    """

    sequence: int
    loads: list[LoadOrder] = field(default_factory=list)
    at_a_time: list[int] = field(default_factory=list)
    """Per tier, how many chunks to read at a time; what else was ordered waits for its turn."""
    cancels: list[int] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    """Blocks that the step's requests did not have before, if anything is ever saved: what was to be saved of whoever
    had them before must be copied by the time that they are written."""
    answer: bool = False
    """Whether to report even if nothing happened."""
    idle: bool = False
    """Whether no request is there, so that the step may wait a moment for saves."""
    awaited: dict[int, list[list[int]]] = field(default_factory=dict)
    """For a layered step: per rank and group of layers, the loads that must be in place before that is computed."""
    patience_s: float = 0.0
    """Seconds after which a layered step waits no more."""


class LoadResult(NamedTuple):
    """How a load ended on one worker. Times are seconds before the report was made: clocks differ between machines."""

    placed: bool
    reason: str
    """Why it failed; "" if it did not, or was cancelled."""
    size: int
    """Bytes read."""
    began_ago_s: float
    ended_ago_s: float
    coded: bool
    """Whether what was read had been encoded."""
    silent: bool = False
    """Whether it failed because the tier did not answer."""


@dataclass
class WorkerReport:
    """From one worker, with a step's output."""

    sequence: int
    """Of the last orders it has taken in."""
    begun: dict[int, float] = field(default_factory=dict)
    """Loads that it began with, and how many seconds ago."""
    ended: dict[int, LoadResult] = field(default_factory=dict)
    unsaved: list[ChunkKey] = field(default_factory=list)
    """Chunks that it could not save."""
    saving: int = 0
    """Saves of which it has not said yet what became of them."""
    waited_s: float = 0.0
    """Seconds that a layered step waited for loads."""
    lost: bool = False
    """Whether a layered step went on without a load that it needed: what it computed is worth nothing."""


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """From all workers, by rank."""

    workers: dict[int, WorkerReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """Both together."""
        assert isinstance(other, StepReport)
        return StepReport(self.workers | other.workers)


@dataclass
class WorkerDescription(KVConnectorHandshakeMetadata):
    """What a worker keeps of every chunk, told to the scheduler once."""

    tags: tuple[str, ...]
    """Parts of the keys of this worker's chunks: which shards it has."""
    layout: str
    """Order of the bytes in a shard, `canonical`."""
    exact_bytes: int
    """Of a shard that is stored as it is; one that is encoded is smaller."""
    chunk_bytes: int
    """To read for a chunk, all its shards together, as far as that is known beforehand."""
    group_bytes: tuple[int, ...]
    """The same per group of layers, for a layered finish."""
    no_documents: str = ""
    """Why documents of prompts cannot be reused; "" if they can."""
