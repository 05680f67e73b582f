"""Makes of full chunks that were computed what is stored of them: answers see the same as had they been loaded.

Chunks are stored without some of their rows where a method acts at store. What is computed is whole, so what an answer
sees would depend on where the two arms met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cakekv.chunk import segments
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import check
from cakekv.embedded.stored import Found
from cakekv.errors import CannotEncode
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded
from cakekv.restore.report import SpanRecord
from cakekv.results import Prefill

_KEY = ChunkKey(bytes(ChunkKey.LENGTH))


class ComputedFront:
    """Encodes and decodes the computed chunks of a prompt's cache in place.

    Parameters
    ----------
    arms : Arms
        The model, and how chunks are encoded.
    """

    def __init__(self, arms: Arms[Any, Any]) -> None:
        engine, size = arms.engine, arms.coder.exact.total_bytes
        self._engine = engine
        self._coder = arms.coder
        self._decoder = engine.decoder(arms.coder)
        self._buffers = [engine.staging(size) for _ in range(3)]

    def replace(self, prefill: Prefill, found: Found) -> None:
        """Replace what was computed of a complete prompt; called by one thread at a time.

        The tokens behind the last full chunk are computed again then, over what is left: so the first token does not
        depend on the restore, either. Chunks stay as they are that would be stored exactly.
        """
        engine, cache, tokens = self._engine, prefill.cache, self._coder.exact.tokens
        length = len(prefill.token_ids)
        chunks = [
            chunk
            for chunk in range(min(length // tokens, found.exact_from))
            if _covers(prefill.report.spans, chunk * tokens, (chunk + 1) * tokens)
        ]
        replaced = [self._replace(cache, chunk * tokens, prefill.report.notes) for chunk in chunks]
        if any(replaced):
            end = min(length // tokens * tokens, length - 1)
            prefill.logits = engine.compute(cache, prefill.token_ids[end:], end)

    def _replace(self, cache: Any, start: int, notes: list[str]) -> bool:
        """Whether a chunk is another one now."""
        check()
        coder, (exact, room, target) = self._coder, self._buffers
        self._engine.gather(cache, start, coder.exact.tokens, segments(coder.exact, exact))
        try:
            chunk = coder.encode(exact, room, _KEY, start)
        except CannotEncode as error:
            notes.append(f"Tokens from {start} stay as they were computed: {error}.")
            return False
        if chunk is None:
            return False
        self._engine.place(cache, start, coder.exact.tokens, decoded(coder, chunk, target, self._decoder))
        return True


def _covers(spans: Sequence[SpanRecord], start: int, end: int) -> bool:
    """Whether spans of prefill, which come in the order of their positions, have covered all positions of a range."""
    for span in spans:
        if span.start <= start < span.start + span.tokens:
            start = span.start + span.tokens
    return start >= end
