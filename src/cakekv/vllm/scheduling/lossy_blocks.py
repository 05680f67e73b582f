"""Which blocks of vLLM's cache are not exact, if chunks are stored by a lossy codec."""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.codec.base import Codec, first_exact_chunk


class LossyBlocks:
    """Keeps track of blocks whose content is not what a full prefill computes.

    So are blocks that a lossy chunk was loaded into, those that vLLM computes wrongly (`adapter_mixing`), and those
    computed behind such: requests share them by vLLM's prefix cache, also with requests that load nothing themselves.

    Parameters
    ----------
    codec : Codec
        How stored chunks are encoded.
    block_tokens : int
        Tokens per block.
    """

    def __init__(self, codec: Codec, block_tokens: int) -> None:
        self.codec = codec
        self.block_tokens = block_tokens
        self._blocks: set[int] = set()
        self._seen: dict[str, tuple[int, bool]] = {}
        """Per request, how many of its blocks were looked at, and whether one of them is lossy."""

    def loaded(self, block_ids: Sequence[int], coded: bool) -> bool:
        """A chunk was loaded into these blocks, decoded or as it was stored. Returns whether they are lossy now."""
        return self._mark(block_ids, coded and self.codec.lossy)

    def reused(self, block_ids: Sequence[int]) -> bool:
        """What was loaded into these blocks was computed behind something else: they are lossy, whatever the codec."""
        return self._mark(block_ids, True)

    def concerns(self, request_id: str, start: int, end: int) -> bool:
        """Whether `computed` has to be told of these tokens: they may be behind lossy ones, and begin a block."""
        if not self._blocks:
            return False
        within = start % self.block_tokens and -(-end // self.block_tokens) == -(-start // self.block_tokens)
        looked, _ = self._seen.get(request_id, (-1, False))
        return not (within and looked >= start // self.block_tokens)

    def computed(self, request_id: str, block_ids: Sequence[int], start: int, end: int, wrong: bool = False) -> bool:
        """A request computes its tokens from `start` to `end`. Returns whether they attend to lossy ones.

        `wrong` if they will not be what they should be, whatever they attend to.
        """
        looked, lossy = self._seen.get(request_id, (0, False))
        before = -(-start // self.block_tokens)
        lossy = lossy or wrong or not self._blocks.isdisjoint(block_ids[looked:before])
        self._seen[request_id] = (max(looked, before), lossy)
        return self._mark(block_ids[start // self.block_tokens : -(-end // self.block_tokens)], lossy)

    def usable_tokens(self, block_ids: Sequence[int], prompt_tokens: int) -> int:
        """How many tokens of a prompt whose first blocks are these may be shared: its newest ones have to be exact."""
        first = first_exact_chunk(prompt_tokens, self.codec.window, self.block_tokens)
        lossy = (index for index in range(first, len(block_ids)) if block_ids[index] in self._blocks)
        return next(lossy, len(block_ids)) * self.block_tokens

    def any_of(self, block_ids: Sequence[int]) -> bool:
        """Whether one of these blocks is lossy."""
        return not self._blocks.isdisjoint(block_ids)

    def _mark(self, block_ids: Sequence[int], lossy: bool) -> bool:
        if lossy:
            self._blocks.update(block_ids)
        else:
            self._blocks.difference_update(block_ids)
        return lossy

    def forget(self, request_id: str) -> None:
        """The request is gone, or begins again."""
        self._seen.pop(request_id, None)
