"""Elastic Cache (arXiv 2407.18121): tokens that receive little attention are merged into the nearest that receive much.

This is what the paper says. Its code takes what `argsort` returns for ranks, and so keeps other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import ALL, Layer, Merged, Method, top

if TYPE_CHECKING:
    import torch

_FIRST = 4
_SLACK = 1e-9
"""Tokens: so that 0.8 * 10 is 8."""


@dataclass(frozen=True)
class ElasticCache(Method):
    """Anchors, the same in all heads of a layer, which become the means of what lies around them.

    The first 4 tokens and the last are kept, too, but nothing is merged into them.

    Parameters
    ----------
    share : float
        Of the tokens so far, this share is *kept*, the first and the last included. What the paper's code calls `ratio`
        is the share that is dropped: its default, 0.2, is 0.8 here.
    rows : int
        So many of the prompt's last rows of attention are summed up; -1 for all, as in the paper.
    merging : {"both", "values", "no"}
        What of an anchor becomes the mean of its bucket: key and value, as in the paper; or the value alone, because
        keys of different positions are turned differently. "no" drops all but the anchors.
    answering : {"fixed", "oldest", "no"}
        What goes while an answer grows, so that the share stays: the entry that is `distance` before the end of what
        was left of the prompt, as in the paper; the oldest behind the first 4; or nothing.
    distance : int
        See `answering`.
    when : {"prefill", "store"}
        Whether prompts are merged, or chunks as they are saved. Chunks come without attention: the tokens with the
        shortest keys are anchors then.
    """

    name: ClassVar[str] = "elastic_cache"
    times: ClassVar[frozenset[str]] = frozenset({"store", "prefill", "decode"})
    share: float = 0.2
    rows: int = ALL
    merging: str = "both"
    answering: str = "fixed"
    distance: int = 25
    when: str = "prefill"

    def __post_init__(self) -> None:
        self.check("share", 0 < self.share <= 1, "above 0, up to 1")
        self.check("rows", self.rows == ALL or 0 < self.rows < 2**31, "1 or more, or -1 for all")
        self.check("merging", self.merging in ("both", "values", "no"), "both, values or no")
        self.check("answering", self.answering in ("fixed", "oldest", "no"), "fixed, oldest or no")
        self.check("distance", 0 < self.distance < 2**31, "1 or more entries")
        self.check("when", self.when in ("prefill", "store"), "prefill or store")
        if self.when == "store":
            self.check_at_store("rows", "distance", *(["answering"] if self.answering == "oldest" else []))

    @property
    def at(self) -> frozenset[str]:
        goes_on = self.when == "prefill" and self.answering != "no" and self.share < 1
        return frozenset({self.when, "decode"} if goes_on else {self.when})

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._keep(layer) for layer in layers]

    def _keep(self, layer: Layer) -> torch.Tensor:
        received = -layer.keys.float().norm(dim=-1) if self.when == "store" else layer.received()
        tokens, which = layer.positions.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        scores = received.new_zeros(len(tokens))  # of all heads together
        scores.scatter_add_(0, which.flatten(), received.masked_fill(~layer.present, 0.0).flatten())
        always = self._always(layer)
        scores[which[always]] = float("inf")
        scores[tokens < 0] = float("-inf")
        kept = (top(scores[None], self._budget(int((tokens >= 0).sum())))[0][which] | always) & layer.present
        layer.memo["left"] = kept.sum(1)
        return kept

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
        """Anchors become means; what goes while an answer grows is dropped."""
        anchors = kept & ~self._always(layer)
        if self.merging == "no" or "answers" in layer.memo or not bool(anchors.any()):
            return None
        into = _nearest(layer.positions, anchors, ~kept & layer.present)
        keys = _means(layer.keys, into) if self.merging == "both" else layer.keys
        return Merged(keys, _means(layer.values, into))

    def step(self, layer: Layer) -> torch.Tensor | None:
        layer.memo["answers"] = True
        there, left = layer.present.sum(1), layer.memo["left"]
        start = (left - (self.distance if self.answering == "fixed" else left)).clamp(min=_FIRST)
        end = (start + (there - self._budget(layer.length)).clamp(min=0)).minimum(there - 1)
        rank = layer.present.cumsum(1) - 1
        going = layer.present & (rank >= start[:, None]) & (rank < end[:, None])
        return ~going if bool(going.any()) else None

    def _budget(self, tokens: int) -> int:
        """How many of so many are kept."""
        return tokens - int(tokens * (1 - self.share) + _SLACK)

    @staticmethod
    def _always(layer: Layer) -> torch.Tensor:
        """The first tokens, and the last of each head."""
        last = layer.positions == layer.positions.amax(1, keepdim=True)
        return (layer.first(_FIRST) | last) & layer.present


def _nearest(positions: torch.Tensor, anchors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(kv_heads, entries): the anchor whose bucket each other is in, the earlier of two that are as near; or itself."""
    import torch

    entries = positions.shape[1]
    column = torch.arange(entries, device=positions.device).expand_as(positions)
    before = torch.where(anchors, column, -1).cummax(1).values
    after = torch.where(anchors, column, entries).flip(1).cummin(1).values.flip(1)
    to_before = positions - positions.gather(1, before.clamp(min=0))
    to_after = positions.gather(1, after.clamp(max=entries - 1)) - positions
    is_before = (before >= 0) & ((to_before <= to_after) | (after == entries))
    has_any = (before >= 0) | (after < entries)
    return torch.where(others & has_any, torch.where(is_before, before, after), column)


def _means(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """(kv_heads, entries, width): where a bucket's anchor is, the mean of the rows in it."""
    import torch

    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    sums.scatter_add_(1, into[..., None].expand_as(rows), rows.float())
    ones = torch.ones(into.shape, dtype=torch.float32, device=rows.device)
    counts = torch.zeros_like(ones).scatter_add_(1, into, ones)
    return torch.where(counts[..., None] > 1, sums / counts[..., None].clamp(min=1), rows.float()).to(rows.dtype)
