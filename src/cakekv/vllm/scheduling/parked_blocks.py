"""Blocks that nobody owns any more, but into which a worker may still write: freed once all workers have answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class ParkedBlocks:
    """Keeps blocks back until no worker writes into them any more.

    That is known once every worker has taken in orders that were made after their loads were given up.

    Parameters
    ----------
    kv_cache_manager : KVCacheManager
        vLLM's.
    """

    def __init__(self, kv_cache_manager: KVCacheManager) -> None:
        self._kv_cache_manager = kv_cache_manager
        self._blocks: list[list[KVCacheBlock]] = []
        self._sequence = 0
        """Number of the last orders."""
        self._fences: deque[tuple[int, Callable[[], None]]] = deque()
        """What to do once workers have taken in the orders of this number."""

    @property
    def waiting(self) -> bool:
        """Whether something is to be done as soon as workers have answered."""
        return bool(self._fences)

    def park(self, request: Request) -> None:
        """Take a request's blocks away, and free them once that is safe."""
        blocks: list[KVCacheBlock] = self._kv_cache_manager.pop_blocks_for_free(request)
        self._blocks.append(blocks)

        def free() -> None:
            self._blocks.remove(blocks)
            self._kv_cache_manager.block_pool.free_blocks(reversed(blocks))

        self.when_safe(free)

    def when_safe(self, action: Callable[[], None]) -> None:
        """Do something once no worker writes for any load that was given up until now."""
        self._fences.append((self._sequence + 1, action))

    def ordered(self, sequence: int) -> None:
        """Orders of this number are made."""
        self._sequence = sequence

    def answered(self, sequence: int) -> None:
        """All workers have taken in the orders up to this number: do what waited for that."""
        while self._fences and self._fences[0][0] <= sequence:
            self._fences.popleft()[1]()

    @contextmanager
    def passed_over(self, others: Iterable[list[KVCacheBlock]]) -> Iterator[None]:
        """Meanwhile, these blocks and those `others` count as free."""
        pool, held = self._kv_cache_manager.block_pool, [*self._blocks, *others]
        for blocks in held:
            pool.free_blocks(reversed(blocks))
        try:
            yield
        finally:
            for blocks in held:
                pool.touch(blocks)
