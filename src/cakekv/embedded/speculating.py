"""The steps of an answer, one token each: computed one by one, or drafted from a cheaper view and verified together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cakekv.decode.base import Sight
from cakekv.embedded.executor import check
from cakekv.engine.base import Engine
from cakekv.results import Prefill

Step = Callable[[int, int], Any]
"""From the token that was chosen for a position to the logits behind it."""


def steps(engine: Engine[Any, Any], prefill: Prefill, sight: Sight | None, end: int) -> Step:
    """What an answer's tokens are computed by.

    Parameters
    ----------
    engine : Engine
        Computes.
    prefill : Prefill
        The prompt's.
    sight : Sight or None
        What its answer sees.
    end : int
        Position of the last token that may be chosen; what would be behind it is of no interest.
    """
    if sight is not None and sight.speculates:
        return Speculating(engine, prefill, sight, end)
    return lambda token, position: engine.compute(prefill.cache, [token], position)


class Speculating:
    """Drafts tokens greedily, verifies them in one forward, and hands out its logits as long as the drafts are chosen.

    However tokens are chosen, at random or with penalties, they are chosen from the logits that the whole view gives
    them one after the other, so an answer is the one that it would be without drafts; they only fail more often then.
    A draft that is not chosen, and all behind it, is forgotten before anything else is computed.

    Parameters
    ----------
    As of `steps`.
    """

    def __init__(self, engine: Engine[Any, Any], prefill: Prefill, sight: Any, end: int) -> None:
        self._engine, self._cache, self._report = engine, prefill.cache, prefill.report
        self._gamma: int = sight.gamma
        self._end = end
        self._ahead = prefill.drafts
        self._drafts: list[int] = []
        """Those behind the last chosen token, and the logits behind each of them."""
        self._logits: Sequence[Any] = ()

    def __call__(self, token: int, position: int) -> Any:
        """The logits behind the token that was chosen for a position; raises what `check` does."""
        if position >= self._end:
            return None
        report = self._report
        report.answer_steps += 1
        if self._drafts:
            if token == self._drafts[0]:
                report.drafted_tokens += 1
                report.accepted_tokens += 1
                self._drafts, self._logits = self._drafts[1:], self._logits[1:]
                return self._logits[0]
            report.drafted_tokens += len(self._drafts)
            report.rejected_tokens += 1
        self._cache.settle(position)
        most = min(self._gamma, self._end - position - 1)
        ahead, self._ahead = self._ahead, []
        if ahead and ahead[0] == token:
            self._drafts = ahead[1 : most + 1]
        else:
            self._drafts = draft(self._engine, self._cache, token, position, most)
        check()
        self._logits = self._engine.verify(self._cache, [token, *self._drafts], position)
        report.answer_read_bytes = self._cache.read_bytes
        return self._logits[0]


def draft(engine: Engine[Any, Any], cache: Any, token: int, position: int, most: int) -> list[int]:
    """What probably comes behind a token, up to a stop token, and as far as the cache has room to verify it."""
    drafts: list[int] = []
    most = min(most, cache.room - 1)
    while len(drafts) < most and token not in engine.stop_tokens:
        check()
        token = engine.draft(cache, token, position + len(drafts))
        drafts.append(token)
    return drafts
