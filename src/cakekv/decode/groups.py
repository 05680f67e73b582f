"""What sights share that put a layer's entries into groups, and see the groups that suit a query, within a budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cakekv.compress.base import Layer
from cakekv.decode.base import Sight, View

_MEMO = "groups"
RECALL = "recall"
"""In `Layer.memo`, while rows of a layer are not read yet: a `Recall`."""


class Groups(NamedTuple):
    """Entries of one layer, each in one group of its head.

    Attributes
    ----------
    end : int
        The entries before it are in groups, but for the sinks.
    order : Tensor
        (kv_heads, entries), int64: the entries, group by group.
    sizes : Tensor
        (kv_heads, groups), int64: entries of each group.
    marks : tuple of Tensor
        (kv_heads, groups, width), float32, each: what queries are compared with.
    """

    end: int
    order: torch.Tensor
    sizes: torch.Tensor
    marks: tuple[torch.Tensor, ...]

    def to(self, device: torch.device) -> Groups:
        """The same on a device."""
        marks = tuple(mark.to(device) for mark in self.marks)
        return Groups(self.end, self.order.to(device), self.sizes.to(device), marks)

    def then(self, later: Groups) -> Groups:
        """These, and those of the entries behind them."""
        marks = tuple(torch.cat(pair, 1) for pair in zip(self.marks, later.marks, strict=True))
        order, sizes = (torch.cat([getattr(one, name) for one in (self, later)], 1) for name in ("order", "sizes"))
        return Groups(later.end, order, sizes, marks)

    def best(self, scores: torch.Tensor, wanted: int) -> torch.Tensor:
        """The first `wanted` entries of the groups, the one with the greatest score first; the last group is trimmed.

        Parameters
        ----------
        scores : Tensor
            (kv_heads, queries per kv head, tokens, groups).
        wanted : int
            At most as many entries as there are.

        Returns
        -------
        Tensor
            (kv_heads, queries per kv head, tokens, wanted), int64.
        """
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        sizes = self.sizes[:, None, None].expand_as(ranked).gather(-1, ranked)
        begins = (self.sizes.cumsum(-1) - self.sizes)[:, None, None].expand_as(ranked).gather(-1, ranked)
        ends = sizes.cumsum(-1)
        slots = torch.arange(wanted, device=scores.device).expand(*ranked.shape[:3], -1).contiguous()
        group = torch.searchsorted(ends, slots, right=True)
        at = slots + (begins - ends + sizes).gather(-1, group)
        return self.order[:, None, None].expand(*ranked.shape[:3], -1).gather(-1, at)


class Recall(NamedTuple):
    """How a layer gets the rows that it has not read yet."""

    entries: Callable[[torch.Tensor], None]
    """Returns once these entries are there: (kv_heads, ..., entries), int64."""
    scored: Callable[[torch.Tensor], None]
    """Is told how much the groups promise, (kv_heads, groups): what is read next."""
    all: Callable[[], None]
    """Returns once everything is there."""


@dataclass(frozen=True)
class Grouped(Sight):
    """Sees the first tokens, the groups that score highest for each query, and the tokens that are in no group yet.

    A text is seen as a whole while it is not longer than the budget, and so are the first layers always. Every token
    stays: one that a step does not see, the next may.

    Parameters
    ----------
    budget : int
        Tokens that a query sees, besides those that are in no group yet.
    sinks : int
        Of these, the first tokens of the text.
    full_layers : int
        So many layers see everything.
    average : bool
        Whether the queries of one head of keys see the same, chosen by their mean. Then keys are gathered once for all
        of them.
    """

    budget: int = 1024
    sinks: int = 16
    full_layers: int = 2
    average: bool = False

    def __post_init__(self) -> None:
        self.check("sinks", self.sinks >= 0, "0 or more")
        self.check("budget", self.budget > self.sinks, f"more than the {self.sinks} sinks")
        self.check("full_layers", self.full_layers >= 0, "0 or more")

    @property
    @abstractmethod
    def waits(self) -> int:
        """So many new tokens come together before they are put into groups."""

    @abstractmethod
    def group(self, layer: Layer, start: int, end: int) -> Groups:
        """Put entries `start` to `end` into groups; `start` is the first that is in none."""

    @abstractmethod
    def score(self, queries: torch.Tensor, groups: Groups) -> torch.Tensor:
        """How much groups promise.

        Parameters
        ----------
        queries : Tensor
            (kv_heads, queries per kv head, tokens, width), float32.
        groups : Groups
            All of the layer.

        Returns
        -------
        Tensor
            (kv_heads, queries per kv head, tokens, groups).
        """

    def groups_layer(self, index: int) -> bool:
        return index >= self.full_layers

    def prepare(self, layers: Sequence[Layer]) -> None:
        """Put a prompt's entries into groups, if it is longer than the budget."""
        for layer in layers:
            if self._chooses(layer):
                self.groups(layer, layer.length)

    def view(self, layer: Layer, mask: torch.Tensor | None) -> View:
        """As `Sight.view`: of one token gathered; of several, which see different things, a mask."""
        queries = layer.queries
        assert queries is not None
        if not self._chooses(layer):
            return super().view(layer, mask)
        groups = self.groups(layer, layer.length - queries.shape[1])
        if groups is None or groups.order.shape[1] <= self.budget - self.sinks:
            return super().view(layer, mask)
        chosen = self.chosen(layer, groups)
        recall: Recall | None = layer.memo.get(RECALL)
        if recall is not None:
            recall.entries(chosen)
        if queries.shape[1] > 1 or mask is not None:
            return View(layer.keys[None], layer.values[None], self._masked(layer, groups, chosen, mask))
        columns = chosen[:, :, 0].flatten(0, 1)
        head = torch.arange(layer.heads, device=columns.device).repeat_interleave(len(columns) // layer.heads)[:, None]
        columns = torch.cat([self._always(layer, groups).expand(len(columns), -1), columns], 1)
        return View(layer.keys[head, columns][None], layer.values[head, columns][None], None)

    def groups(self, layer: Layer, end: int) -> Groups | None:
        """The groups of entries before `end`, but for those that wait; None if there are none yet."""
        memo: dict[str, Any] = layer.memo
        groups: Groups | None = memo.get(_MEMO)
        if groups is None and end > self.sinks:
            groups = memo[_MEMO] = self.group(layer, self.sinks, end)
        elif groups is not None and end - groups.end >= self.waits:
            groups = memo[_MEMO] = groups.then(self.group(layer, groups.end, end))
        return groups

    def chosen(self, layer: Layer, groups: Groups) -> torch.Tensor:
        """The entries of groups that each query sees: (kv_heads, queries per kv head or 1, tokens, budget - sinks)."""
        assert layer.queries is not None
        queries = layer.queries.float()
        queries = queries.reshape(layer.heads, -1, *queries.shape[1:])
        if self.average:
            queries = queries.mean(1, keepdim=True)
        scores = self.score(queries, groups)
        recall: Recall | None = layer.memo.get(RECALL)
        if recall is not None:
            mass = scores * layer.scaling + groups.sizes.float().log()[:, None, None]
            recall.scored(mass.softmax(-1).sum((1, 2)))
        return groups.best(scores, self.budget - self.sinks)

    def _chooses(self, layer: Layer) -> bool:
        return self.groups_layer(layer.index) and layer.length > self.budget

    def _always(self, layer: Layer, groups: Groups) -> torch.Tensor:
        """The entries that every query sees."""
        device = layer.keys.device
        return torch.cat(
            [torch.arange(self.sinks, device=device), torch.arange(groups.end, layer.length, device=device)]
        )

    def _masked(self, layer: Layer, groups: Groups, chosen: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        assert layer.queries is not None
        heads = layer.queries.shape[0]
        seen = torch.zeros((*chosen.shape[:3], layer.entries), dtype=torch.bool, device=chosen.device)
        seen.scatter_(-1, chosen, True)
        seen[..., self._always(layer, groups)] = True
        seen = seen.flatten(0, 1).repeat_interleave(heads // (seen.shape[0] * seen.shape[1]), 0)[None]
        if mask is None:
            return seen
        return seen & mask if mask.dtype is torch.bool else mask.masked_fill(~seen, float("-inf"))
