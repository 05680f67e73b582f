"""KVMerger (arXiv 2407.08454): runs of neighbours with similar keys become one entry each, of Gaussian weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import ALL, Layer, Merged, Method, top

if TYPE_CHECKING:
    import torch

_TINY = 1e-30


@dataclass(frozen=True)
class KVMerger(Method):
    """Sets of consecutive tokens, per layer and head; each leaves an entry at the position of its pivot.

    A token is in its neighbour's set if their keys' cosine is above `epsilon`, however far it is from the others of the
    set. Of a set, the pivot is the token that received most attention.

    Parameters
    ----------
    epsilon : float
        See above; -1 to 1.
    share : float
        If it is not 0: each layer has an `epsilon` of its own, such that this share of its entries is left, or as near
        to that as `recent` and `heavy` allow.
    recent, heavy : float
        These shares of the tokens are left as they are: the newest, and those that received most attention. The paper
        has 0.17 and 0.12 where half of the cache is left, 0.08 and 0.02 for 35%.
    rows : int
        So many of the prompt's last rows of attention are summed up; -1 for all.
    sigma : float
        Width of the weights: how far from the pivot's key the others count. The paper has 5 for models of 7B. 0 is not
        the paper's: each set's own, the root of the mean squared distance.
    values : {"scaled", "weighted", "biased"}
        What becomes of values: their weighted sum times the size of the set, as in the paper, though this does not
        scale what softmax divides by; their weighted sum; or this, and log(size) added to the logit of attention, which
        is right for tokens that are the same. Chunks have no place for that.
    first_layers, last_layers : int
        In so many layers at both ends nothing is merged.
    merging : bool
        Else pivots stay as they are, and the others of their sets are dropped.
    when : {"prefill", "store"}
        Whether prompts are merged, or chunks as they are saved. Chunks come without attention: instead of much of it, a
        token has a short key; and no token is recent.
    """

    name: ClassVar[str] = "kvmerger"
    times: ClassVar[frozenset[str]] = frozenset({"store", "prefill"})
    epsilon: float = 0.75
    share: float = 0.0
    recent: float = 0.17
    heavy: float = 0.12
    rows: int = ALL
    sigma: float = 0.0
    values: str = "scaled"
    first_layers: int = 2
    last_layers: int = 1
    merging: bool = True
    when: str = "prefill"

    def __post_init__(self) -> None:
        self.check("epsilon", -1 <= self.epsilon <= 1, "-1 to 1")
        self.check("share", 0 <= self.share <= 1, "above 0, up to 1; or 0 for what epsilon leaves")
        self.check("recent", 0 <= self.recent <= 1, "0 to 1")
        self.check("heavy", 0 <= self.heavy <= 1, "0 to 1")
        self.check("rows", self.rows == ALL or 0 < self.rows < 2**31, "1 or more, or -1 for all")
        self.check("sigma", 0 <= self.sigma < float("inf"), "above 0, or 0 for each set's own")
        self.check("values", self.values in ("scaled", "weighted", "biased"), "scaled, weighted or biased")
        self.check("first_layers", 0 <= self.first_layers < 2**31, "0 or more layers")
        self.check("last_layers", 0 <= self.last_layers < 2**31, "0 or more layers")
        self.check("when", self.when in ("prefill", "store"), "prefill or store")
        if self.when == "store":
            self.check_at_store("recent", "rows")
            is_biased = self.merging and self.values == "biased"
            self.check("values", not is_biased, "scaled or weighted with when=store: chunks have no place for a bias")

    @property
    def at(self) -> frozenset[str]:
        return frozenset({self.when})

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._keep(layer) for layer in layers]

    def _keep(self, layer: Layer) -> torch.Tensor | None:
        import torch

        if not self.first_layers <= layer.index < layer.layers - self.last_layers:
            return None
        into = layer.memo["into"] = self._sets(layer)
        return (into == torch.arange(layer.entries, device=into.device)) & layer.present

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
        if not self.merging:
            return None
        into = layer.memo.pop("into", None)
        into = self._sets(layer) if into is None else into
        keys, values = layer.keys.float(), layer.values.float()
        away = (keys - _spread(keys, into)).square().sum(-1)
        size = _sums(away.new_ones(away.shape), into)
        two_squares = 2 * (
            away.new_tensor(self.sigma**2) if self.sigma else _sums(away, into) / (size - 1).clamp(min=1)
        )
        weights = (-away / two_squares.clamp(min=_TINY)).exp()
        weights = (weights / _sums(weights, into))[..., None]
        merged = _sums(weights * values, into)
        if self.values == "scaled":
            merged *= size[..., None]
        bias = None
        if self.values == "biased":
            bias = _sums(size.new_ones(size.shape) if layer.bias is None else layer.bias.exp(), into).log()
        return Merged(_sums(weights * keys, into).to(layer.keys.dtype), merged.to(layer.values.dtype), bias)

    def _sets(self, layer: Layer) -> torch.Tensor:
        """(kv_heads, entries): at each entry, which is the pivot of its set."""
        import torch

        is_stored = self.when == "store"
        received = -layer.keys.float().norm(dim=-1) if is_stored else layer.received()
        tokens = int(layer.present.sum(1).max()) if is_stored else layer.length
        free = layer.present if is_stored else layer.present & ~layer.newest(round(self.recent * tokens))
        free = free & ~top(received.masked_fill(~free, float("-inf")), round(self.heavy * tokens))
        likeness = torch.cosine_similarity(layer.keys[:, 1:].float(), layer.keys[:, :-1].float(), dim=-1)
        may_join = free[:, 1:] & free[:, :-1] & (layer.positions.diff(dim=1) == 1)
        if self.share:
            wanted = int(layer.present.sum()) - round(self.share * int(layer.present.sum()))
            joins = (
                top(likeness.masked_fill(~may_join, float("-inf")).view(1, -1), wanted).view(may_join.shape) & may_join
            )
        else:
            joins = may_join & (likeness > self.epsilon)
        number = torch.nn.functional.pad((~joins).cumsum(1), (1, 0))
        most = torch.full_like(received, float("-inf")).scatter_reduce(1, number, received, "amax").gather(1, number)
        column = torch.arange(layer.entries, device=number.device).expand_as(number)
        last = torch.full_like(number, layer.entries)
        pivot = last.scatter_reduce(1, number, torch.where(received == most, column, last), "amin")
        return pivot.gather(1, number)


def _spread(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """At each entry, the row of its pivot."""
    return rows.gather(1, into.view(*into.shape, *[1] * (rows.ndim - 2)).expand_as(rows))


def _sums(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """At each entry, the sum of the rows of its set."""
    import torch

    at = into.view(*into.shape, *[1] * (rows.ndim - 2)).expand_as(rows)
    return torch.zeros_like(rows).scatter_add_(1, at, rows).gather(1, at)
