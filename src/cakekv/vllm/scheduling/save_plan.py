"""Which chunks to save when: every computed chunk once, unless a store has it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

from cakekv.keys import ChunkKey
from cakekv.vllm.messages import SaveOrder
from cakekv.vllm.scheduling.exactness import LossyBlocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_WRITING_S = 30.0
"""Seconds after which a chunk that was handed over should be stored."""
_REMEMBERED = 100_000
"""Chunks of which it is known that they were handed over: 10 MB at most."""


def new_blocks(output: SchedulerOutput) -> list[int]:
    """The blocks that requests of a step did not have in the step before."""
    given = [request.block_ids for request in output.scheduled_new_reqs]
    given += [block_ids for block_ids in output.scheduled_cached_reqs.new_block_ids if block_ids is not None]
    return [block for (group,) in given for block in group]


class SavePlan:
    """Follows each request through its chunks.

    Parameters
    ----------
    chunk_tokens, block_tokens : int
        Tokens per chunk and per block of vLLM's cache.
    lossy : LossyBlocks
        What is not saved.
    """

    def __init__(self, chunk_tokens: int, block_tokens: int, lossy: LossyBlocks) -> None:
        self._chunk_tokens = chunk_tokens
        self._lossy = lossy
        self._chunk_blocks = chunk_tokens // block_tokens
        self._next: dict[str, int] = {}
        """Per request, the first chunk that was not looked at."""
        self._handed_over: OrderedDict[ChunkKey, float] = OrderedDict()
        """When chunks were handed over, the earliest first."""

    def due(self, request_id: str, end: int) -> bool:
        """Whether a chunk of the request is complete, now that it is computed up to `end`."""
        return end // self._chunk_tokens > self._next.get(request_id, 0)

    def orders(
        self,
        request_id: str,
        end: int,
        keys: Sequence[ChunkKey],
        block_ids: Sequence[int],
        stored: Sequence[tuple[int, ...]],
        again: Container[int],
        exact_from: int,
        asked: float,
        now: float,
    ) -> list[SaveOrder]:
        """What to save of a request.

        Parameters
        ----------
        request_id : str
            The request.
        end : int
            It is computed, or loaded, up to here.
        keys : sequence of ChunkKey
            Keys of its chunks, as far as known.
        block_ids : sequence of int
            Its blocks.
        stored : sequence of tuple of int
            Per chunk, who held it when the request came.
        again : container of int
            Chunks to save although they were stored: they could not be had.
        exact_from : int
            The first chunk to save as it is, whatever the codec.
        asked, now : float
            When the stores were asked about the request, and the time, in seconds on any one clock. A chunk that was
            handed over long before and is not stored was evicted, or never written.
        """
        first = self._next.get(request_id, 0)
        last = min(end // self._chunk_tokens, len(keys))
        self._next[request_id] = max(first, last)
        orders = []
        for chunk in range(first, last):
            key = keys[chunk]
            known = (chunk < len(stored) and stored[chunk]) or self._handed_over.get(
                key, -math.inf
            ) > asked - _WRITING_S
            blocks = block_ids[chunk * self._chunk_blocks : (chunk + 1) * self._chunk_blocks]
            if (known and chunk not in again) or self._lossy.any_of(blocks):
                continue
            self._handed_over[key] = now
            self._handed_over.move_to_end(key)
            orders.append(SaveOrder(key, chunk * self._chunk_tokens, tuple(blocks), chunk >= exact_from))
        while len(self._handed_over) > _REMEMBERED:
            self._handed_over.popitem(last=False)
        return orders

    def unsaved(self, keys: Iterable[ChunkKey]) -> None:
        """These could not be saved after all; the next request that computes them may try again."""
        for key in keys:
            self._handed_over.pop(key, None)

    def forget(self, request_id: str) -> None:
        """The request is gone, or begins again."""
        self._next.pop(request_id, None)

    def start_anew(self) -> None:
        """All keys have changed."""
        self._handed_over.clear()
        self._next.clear()
