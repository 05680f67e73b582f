"""vLLM's statistics of its prefix caches, kept true for prompts that are restored."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Protocol

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from cakekv.vllm.scheduling.restoration import Restoration

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.metrics.stats import PrefixCacheStats
    from vllm.v1.request import Request


class CountingScheduler(Protocol):
    """What of the scheduler is used here. Its statistics are others after every step."""

    connector_prefix_cache_stats: PrefixCacheStats | None
    kv_cache_manager: KVCacheManager
    log_stats: bool


class HitStatistics:
    """Counts a restore's hits when it is over.

    vLLM counts all that a connector offers as hits at once, before it is known how much of that is loaded. And for
    requests that it parked it looks into its own cache twice.

    Parameters
    ----------
    scheduler : CountingScheduler
        Has the statistics.
    """

    def __init__(self, scheduler: CountingScheduler) -> None:
        self._scheduler = scheduler
        self._open: set[str] = set()
        """The requests whose restores had begun before this step."""
        self._looked_up_again: list[Request] = []
        """Those of the coming step that vLLM looked up a second time."""

    def begin_step(self, restorations: Mapping[str, Restoration]) -> None:
        """Before vLLM puts a step together."""
        self._open = set(restorations)
        self._looked_up_again.clear()

    def looked_up_again(self, request: Request) -> None:
        """For this request, vLLM looks into its own cache a second time."""
        self._looked_up_again.append(request)

    def correct(self, restorations: Mapping[str, Restoration], scheduled: Container[str]) -> None:
        """The step is put together: take back the hits of restores that only begin, and what was looked up twice."""
        offered, own = self._scheduler.connector_prefix_cache_stats, self._scheduler.kv_cache_manager
        for request_id, restoration in restorations.items():
            if request_id not in self._open:
                hits = restoration.planner.prefix_tokens - restoration.local_tokens
                self._uncount(offered, restoration.request, restoration.queried_tokens, hits)
        for request in self._looked_up_again:
            if request.request_id in scheduled:
                self._uncount(offered, request, request.num_tokens, 0)
                if own.prefix_cache_lookup_enabled(request):
                    self._uncount(own.prefix_cache_stats, request, request.num_tokens, 0)

    def _uncount(self, stats: PrefixCacheStats | None, request: Request, tokens: int, hits: int) -> None:
        """The reverse of `PrefixCacheStats.record`, within the same step."""
        if stats is None or not self._scheduler.log_stats:
            return
        if request.num_preemptions > 0:
            stats.preempted_requests -= 1
            stats.preempted_queries -= tokens
            stats.preempted_hits -= hits
            return
        stats.requests -= 1
        stats.queries -= tokens
        stats.hits -= hits
        for source, count in list(stats.hits_by_source.items()):
            taken = min(count, hits)
            hits -= taken
            stats.hits_by_source[source] = count - taken

    def count_loaded(self, restoration: Restoration) -> None:
        """A restore is over: what it loaded was a hit."""
        stats = self._scheduler.connector_prefix_cache_stats
        if stats is None:
            return
        hits = restoration.planner.report().loaded_tokens
        stats.record(
            num_tokens=restoration.queried_tokens,
            num_hits=hits,
            preempted=restoration.request.num_preemptions > 0,
            hits_by_source={CacheHitSource.EXTERNAL_UNSPECIFIED: hits} if hits else None,
        )

    def count_prefill(self, restoration: Restoration) -> None:
        """The last tokens of a restored prompt are on their way: say how it was covered."""
        request, local = restoration.request, restoration.local_tokens
        if request.prefill_stats is not None and not request.num_preemptions:
            loaded = restoration.planner.report().loaded_tokens
            request.prefill_stats.set(request.num_prompt_tokens, local, min(loaded, request.num_prompt_tokens - local))
