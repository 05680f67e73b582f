"""Orders the saves of every step, and keeps track of what in the cache is exact enough to be saved."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING

from cakekv.vllm.admission import Admission
from cakekv.vllm.exactness import LossyBlocks, first_exact_chunk
from cakekv.vllm.messages import StepOrders
from cakekv.vllm.restoration import Restoration
from cakekv.vllm.save_plan import SavePlan, new_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from cakekv.vllm.scheduler import CakeSchedulerMixin


class SaveDesk:
    """The scheduler's side of all workers' saves.

    Parameters
    ----------
    scheduler : CakeSchedulerMixin
        Knows the requests and their blocks.
    admission : Admission
        Knows what is stored of them.
    plan : SavePlan
        Which chunks to save.
    lossy : LossyBlocks
        Told of everything that is computed.
    mixes_adapters : bool
        Whether vLLM computes requests without an adapter wrongly beside those with one.
    """

    def __init__(
        self,
        scheduler: CakeSchedulerMixin,
        admission: Admission,
        plan: SavePlan,
        lossy: LossyBlocks,
        mixes_adapters: bool,
    ) -> None:
        self._scheduler = scheduler
        self._admission = admission
        self._plan = plan
        self._lossy = lossy
        self._mixes_adapters = mixes_adapters

    def order(self, orders: StepOrders, output: SchedulerOutput, restorations: Mapping[str, Restoration]) -> None:
        """Put what the step completes into its orders."""
        options = self._admission.options
        if options.save:
            orders.new_blocks = new_blocks(output)
        requests = self._scheduler.requests
        beside_adapter = self._mixes_adapters and any(
            requests[request_id].lora_request is not None for request_id in output.num_scheduled_tokens
        )
        for request_id, tokens in output.num_scheduled_tokens.items():
            restoration = restorations.get(request_id)
            if restoration is not None and restoration.unsure:
                continue  # with the next step, if it was not in vain
            request = requests[request_id]
            wrong = beside_adapter and request.lora_request is None
            self.note(request_id, request.num_computed_tokens, tokens, restoration, wrong)
            end = min(request.num_computed_tokens + tokens, request.num_tokens)
            if options.save and self._plan.due(request_id, end) and self._admission.asked(request_id).save:
                lookup = self._admission.lookup
                orders.saves += self._plan.orders(
                    request_id,
                    end,
                    self._admission.keyring.keys(request),
                    self._block_ids(request_id),
                    lookup.answer(request_id) or [],
                    restoration.lost if restoration is not None else (),
                    first_exact_chunk(request.num_tokens, self._lossy.codec.window, options.chunk_tokens),
                    lookup.asked(request_id),
                    monotonic(),
                )

    def note(
        self, request_id: str, start: int, tokens: int, restoration: Restoration | None, wrong: bool = False
    ) -> None:
        """A request computes so many tokens: if they come out wrong, or anything before them is lossy, so are they."""
        if wrong or self._lossy.concerns(request_id, start, start + tokens):
            lossy = self._lossy.computed(request_id, self._block_ids(request_id), start, start + tokens, wrong)
            if lossy and restoration is not None:
                restoration.after_lossy_tokens += max(0, min(tokens, restoration.restore.prompt_tokens - start))

    def _block_ids(self, request_id: str) -> list[int]:
        block_ids: list[int] = self._scheduler.kv_cache_manager.get_block_ids(request_id)[0]
        return block_ids
