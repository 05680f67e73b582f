"""The paper's own Cake, to compare with: no cost models, two pointers that move towards each other until they meet."""

from __future__ import annotations

from cakekv.restore.flights import Load
from cakekv.restore.planner import Span, Wait
from cakekv.restore.report import FrontierPoint


class CakeBaseline:
    """Speaks the planner's protocol, so that the same clock drives either.

    Compute takes the next `step_tokens` tokens from the front, whatever is on its way to them, unless they are loaded;
    the loader takes the chunks from the back, one at a time, unless they are computed. Neither looks ahead.

    Parameters
    ----------
    tokens : int
        Tokens of the stored prefix, which is the whole prompt.
    token_bytes : float
        Bytes of KV cache per token.
    step_tokens : int
        Granularity of computing.
    chunk_tokens : int
        Granularity of loading.
    """

    def __init__(self, tokens: int, token_bytes: float, step_tokens: int = 512, chunk_tokens: int = 128) -> None:
        self.tokens = tokens
        self._token_bytes = token_bytes
        self._step_tokens = step_tokens
        self._chunk_tokens = chunk_tokens
        self.front = 0
        """Where computed positions end."""
        self.back = tokens
        """Where loaded positions begin."""
        self.frontiers = [FrontierPoint(0.0, 0, tokens)]
        self._load: Load | None = None

    def next_compute(self, now: float) -> Span | Wait | None:
        """The next step, or None when the arms have met."""
        if self.front >= self.back:
            return None
        return Span(self.front, min(self._step_tokens, self.tokens - self.front))

    def computed(self, span: Span, now: float, waited_s: float = 0.0) -> None:
        """A step ended."""
        self.front = span.start + span.tokens
        self.frontiers.append(FrontierPoint(now, self.front, self.back))
        if self._load is not None and self.front >= self._load.start + self._load.tokens:
            self._load.cancelled = True

    def layer_ready(self, group: int) -> bool:
        """Never asked: the paper's Cake waits for whole chunks before the suffix."""
        return True

    def next_load(self, tier: int, now: float) -> Load | None:
        """The next chunk from the back, unless one is on its way or nothing is left."""
        if self._load is not None or self.front >= self.back:
            return None
        start = max(0, (self.back - 1) // self._chunk_tokens * self._chunk_tokens)
        tokens = self.back - start
        self._load = Load(start, start, tokens, tier, True, round(tokens * self._token_bytes), now)
        return self._load

    def arrived(self, load: Load, now: float) -> bool:
        """The chunk's bytes are here; they are always used."""
        return not load.cancelled

    def placed(self, load: Load, now: float) -> None:
        """The chunk is in the cache."""
        self.back = load.start
        self.frontiers.append(FrontierPoint(now, self.front, self.back))
        self._load = None

    def abandoned(self, load: Load, size: int, now: float) -> None:
        """A cancelled load was given up."""
        self._load = None
