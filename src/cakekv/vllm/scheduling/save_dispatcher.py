"""Orders each step's saves: every computed chunk once, unless a store has it or it is not exact enough."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from cakekv.codec.base import first_exact_chunk
from cakekv.keys import ChunkKey
from cakekv.vllm.messages import SaveOrder, StepOrders
from cakekv.vllm.scheduling.admission import Admission
from cakekv.vllm.scheduling.lossy_blocks import LossyBlocks
from cakekv.vllm.scheduling.restoration import Restoration

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_WRITING_S = 30.0
"""Seconds after which a chunk that was handed over should be stored."""
_REMEMBERED = 100_000
"""Chunks of which it is known that they were handed over: 10 MB at most."""


def new_blocks(output: SchedulerOutput) -> list[int]:
    """The blocks that requests of a step did not have in the step before."""
    given = [request.block_ids for request in output.scheduled_new_reqs]
    given += [block_ids for block_ids in output.scheduled_cached_reqs.new_block_ids if block_ids is not None]
    return [block for (group,) in given for block in group]


class SaveDispatcher:
    """The scheduler's side of all workers' saves.

    Parameters
    ----------
    requests : mapping of str to Request
        vLLM's, by id.
    block_ids : callable
        From a request's id to its blocks.
    admission : Admission
        Knows what is stored of them.
    tracker : SaveTracker
        Which chunks to save.
    lossy : LossyBlocks
        Told of everything that is computed.
    mixes_adapters : bool
        Whether vLLM computes requests without an adapter wrongly beside those with one.
    """

    def __init__(
        self,
        requests: Mapping[str, Request],
        block_ids: Callable[[str], Sequence[int]],
        admission: Admission,
        tracker: SaveTracker,
        lossy: LossyBlocks,
        mixes_adapters: bool,
    ) -> None:
        self._requests = requests
        self._block_ids = block_ids
        self._admission = admission
        self._tracker = tracker
        self._lossy = lossy
        self._mixes_adapters = mixes_adapters

    def order(self, orders: StepOrders, output: SchedulerOutput, restorations: Mapping[str, Restoration]) -> None:
        """Put what the step completes into its orders."""
        options = self._admission.options
        if options.save:
            orders.new_blocks = new_blocks(output)
        beside_adapter = self._mixes_adapters and any(
            self._requests[request_id].lora_request is not None for request_id in output.num_scheduled_tokens
        )
        for request_id, tokens in output.num_scheduled_tokens.items():
            restoration = restorations.get(request_id)
            if restoration is not None and restoration.layered:
                continue  # with the next step, if it was not in vain
            request = self._requests[request_id]
            wrong = beside_adapter and request.lora_request is None
            self.note(request_id, request.num_computed_tokens, tokens, restoration, wrong)
            end = min(request.num_computed_tokens + tokens, request.num_tokens)
            if options.save and self._tracker.due(request_id, end) and self._admission.options_of(request_id).save:
                lookup = self._admission.lookup
                orders.saves += self._tracker.orders(
                    request_id,
                    end,
                    RequestChunks(
                        self._admission.chunk_names.keys(request),
                        self._block_ids(request_id),
                        lookup.answer(request_id) or [],
                        lookup.asked_at(request_id),
                        first_exact_chunk(request.num_tokens, self._lossy.codec.window, options.chunk_tokens),
                    ),
                    restoration.lost if restoration is not None else (),
                    monotonic(),
                )

    def note(
        self, request_id: str, start: int, tokens: int, restoration: Restoration | None, wrong: bool = False
    ) -> None:
        """A request computes so many tokens: if they come out wrong, or anything before them is lossy, so are they."""
        if wrong or self._lossy.concerns(request_id, start, start + tokens):
            lossy = self._lossy.computed(request_id, self._block_ids(request_id), start, start + tokens, wrong)
            if lossy and restoration is not None:
                restoration.after_lossy_tokens += max(0, min(tokens, restoration.planner.prompt_tokens - start))


class RequestChunks(NamedTuple):
    """The chunks of one request."""

    keys: Sequence[ChunkKey]
    """As far as known."""
    block_ids: Sequence[int]
    """The request's blocks, one after the other."""
    stored: Sequence[tuple[int, ...]]
    """Per chunk, who held it when the request came."""
    asked_at: float
    """When the stores were asked that. What was handed over long before, and is not stored, is to be saved again."""
    exact_from: int
    """The first chunk to save as it is, whatever the codec."""


class SaveTracker:
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
        chunks: RequestChunks,
        again: Container[int],
        now: float,
    ) -> list[SaveOrder]:
        """What to save of a request.

        Parameters
        ----------
        request_id : str
            The request.
        end : int
            It is computed, or loaded, up to here.
        chunks : RequestChunks
            Its chunks.
        again : container of int
            Those to save although they were stored: they could not be had.
        now : float
            The time, on the clock of `RequestChunks.asked_at`, in seconds.
        """
        first = self._next.get(request_id, 0)
        last = min(end // self._chunk_tokens, len(chunks.keys))
        self._next[request_id] = max(first, last)
        orders = []
        for chunk in range(first, last):
            key, stored = chunks.keys[chunk], chunk < len(chunks.stored) and chunks.stored[chunk]
            known = stored or self._handed_over.get(key, -math.inf) > chunks.asked_at - _WRITING_S
            blocks = chunks.block_ids[chunk * self._chunk_blocks : (chunk + 1) * self._chunk_blocks]
            if (known and chunk not in again) or self._lossy.any_of(blocks):
                continue
            self._handed_over[key] = now
            self._handed_over.move_to_end(key)
            orders.append(SaveOrder(key, chunk * self._chunk_tokens, tuple(blocks), chunk >= chunks.exact_from))
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
