"""Prompts that are longer than the model's context: computed in strides, over what a method left of the text before.

Nothing of such a prompt is loaded or saved: what a stride computes depends on what was let go of before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

from cakekv.compress.base import Method
from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.executor import check
from cakekv.engine.base import Engine
from cakekv.errors import PromptTooLong
from cakekv.prompt import Tokenized
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.report import FrontierPoint, RestoreReport, SpanRecord
from cakekv.results import OnProgress, Prefill, Progress


class Streaming:
    """Takes prompts in strides, if a method can go on that way for ever.

    Parameters
    ----------
    arms : Arms
        The engine, and who lends it.
    method : Method or None
        Chooses what is kept of prompts.
    """

    def __init__(self, arms: Arms[Any, Any], method: Method | None) -> None:
        self._arms = arms
        self._method = method
        self._wanted = None if method is None else method.strides

    @property
    def tokens(self) -> int:
        """Of a stride; not above 0 if there is no room for any."""
        if self._wanted is None:
            return 0
        windows = [layer.window for layer in self._arms.engine.layout.layers if layer.window is not None]
        return min(self._wanted.tokens, self._arms.engine.max_context - max([self._wanted.entries, *windows]))

    @property
    def has_no_end(self) -> bool:
        """Whether an answer may go on beyond the model's context."""
        return self.tokens > 0

    def takes(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt is taken in strides."""
        if not self.has_no_end:
            return False
        assert self._wanted is not None
        return self._wanted.always or len(token_ids) > self._arms.engine.max_context

    def check(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt that the model cannot take, as `Engine.check_prompt` does.

        Raises
        ------
        BadInput
            As there; `PromptTooLong` unless it is taken in strides.
        """
        try:
            self._arms.engine.check_prompt(token_ids, must_fit=not self.takes(token_ids))
        except PromptTooLong as error:
            if self._wanted is None:
                raise
            assert self._method is not None
            raise PromptTooLong(
                f"{error}, or have compress {self._method.name} keep fewer than its {self._wanted.entries} tokens, "
                "which leave no room for strides"
            ) from None

    def planned(self, token_ids: Sequence[int]) -> PlannedRun:
        """What becomes of a prompt that is taken in strides."""
        return PlannedRun(0, len(token_ids), "compute", f"in strides of {self.tokens} tokens", 0.0)

    def prefill(self, request: Request, prompt: Tokenized, on_progress: OnProgress | None) -> Prefill:
        """What is left of a prompt once all of it was taken, in strides."""
        arms, method, token_ids = self._arms, self._method, prompt.token_ids
        assert method is not None
        report = RestoreReport("compute", len(token_ids), arms.options.chunk_tokens, compress=method.recipe)
        report.bytes_by_tier = {tier.name: 0 for tier in arms.tiers}
        report.codec = arms.options.codec.name
        cache, logits, tokens = None, None, self.tokens
        for start in range(0, len(token_ids), tokens):
            check()
            stride = token_ids[start : start + tokens]
            began = monotonic() - request.arrived_s
            with arms.arbiter.turn(request):
                cache, logits = take(arms.engine, method, cache, stride, start)
            end = start + len(stride)
            report.ttft_s = monotonic() - request.arrived_s
            report.spans.append(SpanRecord(start, len(stride), began, report.ttft_s))
            report.frontiers.append(FrontierPoint(report.ttft_s, end, len(token_ids)))
            report.computed_tokens = end
            if on_progress is not None:
                self._tell(on_progress, end, len(token_ids), report.ttft_s)
        assert cache is not None
        report.kept_share, report.cache_bytes = cache.kept_share, cache.held_bytes
        report.notes += request.notes
        report.notes.append(
            f"The prompt was taken in strides of {tokens} tokens, each of which saw what {method.name} had left "
            f"of the text before it; the model's context is {arms.engine.max_context} tokens. Nothing was loaded or "
            "saved."
        )
        return Prefill(token_ids, cache, logits, report)

    def _tell(self, on_progress: OnProgress, end: int, length: int, elapsed_s: float) -> None:
        arbiter = self._arms.arbiter
        bands = [(0, end, "computed"), (end, length, "missing")][: 1 if end == length else 2]
        with arbiter.lock:
            arbiter.tell(on_progress, Progress("compute", length, 0, end, length, bands, elapsed_s))


def take(engine: Engine[Any, Any], method: Method, cache: Any, stride: Sequence[int], start: int) -> tuple[Any, Any]:
    """Compute a stride of a text.

    Parameters
    ----------
    engine : Engine
        The model.
    method : Method
        Has `strides`.
    cache : RaggedCache or None
        What is left of the text before; None for the first stride.
    stride : sequence of int
        Its tokens.
    start : int
        Position of the first of them.

    Returns
    -------
    (RaggedCache, logits)
        What is left with it, and the logits of its last token.
    """
    if cache is not None:
        return cache, engine.compute(cache, stride, start)
    whole = engine.new_cache(len(stride))
    logits = engine.compute(whole, stride, 0)
    return engine.compress(whole, stride, method), logits
