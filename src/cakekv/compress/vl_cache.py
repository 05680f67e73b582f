"""VL-Cache (arXiv 2410.23317): what the question looks at, more of it in layers that look at much.

Made for questions about images; it serves as well for a question that follows a long text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import Layer, Method, top

if TYPE_CHECKING:
    import torch

_LEAST = 0.01
"""Of a prompt's tokens, the smallest share that a layer keeps."""
_EVERY = 2**31 - 1


@dataclass(frozen=True)
class VLCache(Method):
    """The greatest sums of attention from the question's rows; a layer's budget follows from how dense these are.

    Parameters
    ----------
    share : float
        Of the prompt's tokens, this share is kept, on average over the layers.
    recent : float
        Of those that are kept, this share is for the newest.
    p : float
        Attention counts as dense where it is at least this share of its row's maximum. With 0, all layers keep alike.
    rows_of : str
        The rows that are looked at: of the "question", which is what is marked as one, or what follows the last mark;
        or of the whole "prompt", to compare with.
    window : int
        The most rows of a question: its last ones. If nothing is marked, so many of the prompt's last rows.
    """

    name: ClassVar[str] = "vl_cache"
    share: float = 0.1
    recent: float = 0.1
    p: float = 0.01
    rows_of: str = "question"
    window: int = 50

    def __post_init__(self) -> None:
        self.check("share", 0 < self.share <= 1, "above 0, up to 1")
        self.check("recent", 0 <= self.recent <= 1, "0 to 1")
        self.check("p", 0 <= self.p <= 1, "0 to 1")
        self.check("rows_of", self.rows_of in ("question", "prompt"), "question or prompt")
        self.check("window", 0 < self.window < 2**31, "1 or more")

    @property
    def rows(self) -> int:
        return _EVERY if self.rows_of == "prompt" else self.window

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        if self.share == 1 or not layers:
            return [None] * len(layers)
        tokens = layers[0].length
        seen = [self.look(layer) for layer in layers]
        total = round(self.share * tokens * len(layers))
        budgets = apportioned([density for density, _ in seen], total, max(1, round(_LEAST * tokens)), tokens)
        return [
            self._keep(layer, scores, budget) for layer, (_, scores), budget in zip(layers, seen, budgets, strict=True)
        ]

    def _keep(self, layer: Layer, scores: torch.Tensor, budget: int) -> torch.Tensor:
        recent = layer.newest(round(self.recent * budget))
        scores = scores.masked_fill(recent, float("inf")).masked_fill(~layer.present, float("-inf"))
        return top(scores, budget) & layer.present

    def look(self, layer: Layer) -> tuple[float, torch.Tensor]:
        """How dense the rows are, as a share of what they see; how much every entry receives, (kv_heads, entries)."""
        import torch

        scores = torch.zeros(layer.positions.shape, dtype=torch.float32, device=layer.keys.device)
        dense = causal = 0
        for part in self._asking(layer).by_rows():
            attention, visible = part.attention(), part.visible()[:, None]
            scores += attention.mean(1).sum(1)
            dense += int((visible & (attention >= self.p * attention.amax(-1, keepdim=True))).sum())
            causal += int(visible.expand_as(attention).sum())
        return dense / causal, scores

    def _asking(self, layer: Layer) -> Layer:
        """The layer with the queries of the question only."""
        import torch

        at = layer.query_positions
        assert layer.queries is not None
        assert at is not None
        if self.rows_of == "prompt":
            return layer
        asking = torch.zeros_like(at, dtype=torch.bool)
        for mark in layer.marked:
            if mark.what == "question":
                asking |= (mark.start <= at) & (at < mark.end)
        if not bool(asking.any()):
            asking = at >= max((mark.end for mark in layer.marked if mark.what != "question"), default=0)
        if not bool(asking.any()):
            return layer
        return replace(layer, queries=layer.queries[:, asking], query_positions=at[asking])


def apportioned(weights: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """A total in whole parts as proportional to weights as bounds let them be, by largest remainder.

    Parameters
    ----------
    weights : sequence of float
        Above 0.
    total : int
        The sum of all parts, if the bounds admit that; else it is the next that they admit.
    least, most : int
        Bounds of every part.
    """
    total = min(max(total, least * len(weights)), most * len(weights))
    parts = [0.0] * len(weights)
    free = set(range(len(weights)))
    while free:
        left = total - sum(part for number, part in enumerate(parts) if number not in free)
        sum_of_free = sum(weights[number] for number in free)
        for number in free:
            parts[number] = left * weights[number] / sum_of_free
        over = {number for number in free if parts[number] > most}
        under = {number for number in free if parts[number] < least}
        if not over and not under:
            break
        # What is cut off from those above goes to the others, and lifts some of those below; or the other way round.
        is_over = sum(parts[number] - most for number in over) >= sum(least - parts[number] for number in under)
        for number in over if is_over else under:
            parts[number] = most if is_over else least
        free -= over if is_over else under
    whole = [int(part) for part in parts]
    remainders = sorted(range(len(parts)), key=lambda number: whole[number] - parts[number])
    for number in remainders[: total - sum(whole)]:
        whole[number] += 1
    return whole
