"""Cascading KV Cache (arXiv 2406.17808): rings of equal size, each of which takes half of what the one before lets go.

A cache of a constant size reaches back exponentially far with the number of rings, and gets sparser on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from cakekv.compress.base import Layer, Method, Strides
from cakekv.errors import BadInput

if TYPE_CHECKING:
    import torch

_EVERY_ROW = 2**31 - 1


@dataclass(frozen=True)
class Cascading(Method):
    """Sinks, and cascades of tokens that get older and sparser. Entries move up to consecutive positions.

    Token by token enters the first cascade; the one that a full cascade lets go of for it is offered to the next.
    Cascade i accepts one with every 2^i-th token of the text, and with every token until the cache is full for the
    first time. One that is not accepted takes the place of the newest there, if its score is as high or higher. A score
    is the exponential moving average of attention received.

    A prompt that is longer than the model's context is taken in strides, each of which sees what is left of the text
    before, and then enters. A prompt that fits is restored or computed as ever, seeing everything, and replayed: each
    stride in turn, with its own queries' attention to what would have been left by then.

    Parameters
    ----------
    size : int
        Tokens that are kept at most, in each head.
    cascades : int
        Their number; all have the same size.
    sinks : int
        So many of the first tokens are kept, up to a quarter of `size`.
    beta : float
        Of the moving average; the paper's. Its code has 0.9999999 by now.
    stride_tokens : int
        Tokens that enter at once; also of a replay. The paper has 4096 for retrieval of passkeys.
    answer_tokens : int
        The same while an answer grows: so many wait besides `size`. The paper has 1, which takes more time.
    reduce : {"mean", "max"}
        What is made of the attention of several query heads to the same key.
    shared : bool
        Whether all heads of a layer have the same scores.
    last_rows : int
        If it is not 0, the scores of a replay are what the prompt's last so many queries attend to, as a question's
        would: not the paper's, and a prompt that is taken in strides cannot have it.
    prefill : {"replay", "stride"}
        Whether prompts that fit into the context are taken in strides, too: nothing is restored or saved of them then.
    """

    name: ClassVar[str] = "cascading"
    times: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})
    compact: ClassVar[bool] = True
    size: int = 512
    cascades: int = 4
    sinks: int = 64
    beta: float = 0.9999
    stride_tokens: int = 1024
    answer_tokens: int = 16
    reduce: str = "mean"
    shared: bool = False
    last_rows: int = 0
    prefill: str = "replay"

    def __post_init__(self) -> None:
        self.check("cascades", 0 < self.cascades <= 32, "1 to 32")
        self.check("size", 2 * self.cascades <= self.size < 2**31, f"{2 * self.cascades} tokens or more, 2 per cascade")
        self.check("sinks", 0 <= self.sinks < 2**31, "0 or more tokens")
        self.check("beta", 0 <= self.beta < 1, "0 or more, below 1")
        self.check("stride_tokens", 0 < self.stride_tokens < 2**31, "1 or more tokens")
        self.check("answer_tokens", 0 < self.answer_tokens < 2**31, "1 or more tokens")
        self.check("reduce", self.reduce in ("mean", "max"), "mean or max")
        self.check("last_rows", 0 <= self.last_rows < 2**31, "0 or more rows")
        self.check("prefill", self.prefill in ("replay", "stride"), "replay or stride")
        can_look = self.prefill == "replay" or not self.last_rows
        self.check("last_rows", can_look, "0 with prefill=stride: the last rows are not there when strides enter")

    @property
    def rows(self) -> int:
        """All queries, since `ALL` stands for sums over them."""
        return self.last_rows or _EVERY_ROW

    @property
    def stride(self) -> int:
        return self.answer_tokens

    @property
    def strides(self) -> Strides:
        return Strides(self.size + self.answer_tokens - 1, self.stride_tokens, self.prefill == "stride")

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [self._replay(layer) for layer in layers]

    def _replay(self, layer: Layer) -> torch.Tensor:
        import torch

        every = torch.arange(layer.length, device=layer.positions.device)
        if layer.positions.shape[1] != layer.length or not bool((layer.positions == every).all()):
            raise BadInput("compress cascading replays a cache that has everything: combine it with no other method")
        assert layer.queries is not None
        assert layer.query_positions is not None
        unseen = layer.length - layer.queries.shape[1]
        left = every[:0].repeat(layer.heads, 1)
        memory = _Memory(torch.zeros(left.shape, dtype=torch.float64, device=left.device), [0] * self.cascades)
        stride = layer.length if self.last_rows else self.stride_tokens
        for start in range(0, layer.length, stride):
            end = min(start + stride, layer.length)
            left = torch.cat([left, every[start:end].expand(layer.heads, -1)], 1)
            rows = slice(max(0, start - unseen), end - unseen)
            there = replace(
                layer,
                keys=layer.keys.gather(1, left[..., None].expand(-1, -1, layer.keys.shape[2])),
                positions=left,
                length=end,
                queries=layer.queries[:, rows],
                query_positions=layer.query_positions[rows],
                bias=None,
            )
            kept = self._enter(there, memory)
            left = left[kept].view(layer.heads, -1)
        layer.memo["cascades"] = memory
        return torch.zeros_like(layer.positions, dtype=torch.bool).scatter_(1, left, True)

    def step(self, layer: Layer) -> torch.Tensor | None:
        return self._enter(layer, layer.memo["cascades"])

    def _enter(self, layer: Layer, memory: _Memory) -> torch.Tensor:
        """Have the newest tokens enter the cascades; returns which entries are left, (kv_heads, entries)."""
        import torch

        tokens = layer.entries - memory.scores.shape[1]  # a forward that failed may have cost queries of theirs
        rows = layer.attention()
        ages = torch.arange(rows.shape[2] - 1, -1, -1, dtype=rows.dtype, device=rows.device)
        received = torch.matmul(self.beta**ages, rows).double() * (1 - self.beta)
        over = (0, 1) if self.shared else 1
        received = received.mean(over) if self.reduce == "mean" else received.amax(over)
        scores = received.expand(layer.heads, -1).clone()
        scores[:, :-tokens] += self.beta**tokens * memory.scores
        kept = self._cascade(scores, memory.sizes, layer.length - tokens, tokens)
        memory.scores = scores[kept].view(layer.heads, -1)
        return kept

    def _cascade(self, scores: torch.Tensor, sizes: list[int], start: int, tokens: int) -> torch.Tensor:
        """Which entries are left; all heads have as many: sinks, the oldest cascade, .., the newest.

        Parameters
        ----------
        scores : Tensor
            (kv_heads, entries); the last `tokens` of them enter.
        sizes : list of int
            Of the cascades, the newest first; brought up to date.
        start : int
            Position of the first token that enters.
        tokens : int
            How many enter.
        """
        import torch

        sinks = min(self.sinks, self.size // 4)
        room = (self.size - sinks) // self.cascades
        heads, entries = scores.shape
        columns = torch.arange(entries, device=scores.device).expand(heads, -1)
        end = entries - tokens
        comes = columns[:, end:]
        with_token = np.arange(start, start + tokens)
        sinking = min(max(0, sinks - start), tokens)
        parts = [comes[:, :sinking]]
        comes, with_token = comes[:, sinking:], with_token[sinking:]
        for number in range(self.cascades):
            there = columns[:, end - sizes[number] : end]
            end -= sizes[number]
            if len(with_token):
                accepts = (with_token - sinks) % 2**number == 0
                accepts |= with_token <= sinks + self.cascades * room
                if not there.shape[1]:
                    accepts[0] = True
                winners = _winners(scores, torch.cat([there[:, -1:], comes], 1), accepts)
                there = torch.cat([there[:, :-1], winners], 1)
                over = max(0, there.shape[1] - room)
                comes, with_token = there[:, :over], with_token[accepts][int(accepts.sum()) - over :]
                there = there[:, over:]
            sizes[number] = there.shape[1]
            parts.append(there)
        parts.append(columns[:, :end])
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, torch.cat(parts, 1), True)


@dataclass
class _Memory:
    """What a layer remembers of its cascades."""

    scores: torch.Tensor
    """(kv_heads, entries), float64: `beta` may be too near to 1 for less."""
    sizes: list[int]
    """Of the cascades, the newest first."""


def _winners(scores: torch.Tensor, columns: torch.Tensor, accepts: npt.NDArray[np.bool_]) -> torch.Tensor:
    """Of a cascade's newest entry and those that come, the entries that are left.

    Parameters
    ----------
    scores : Tensor
        (kv_heads, entries).
    columns : Tensor
        (kv_heads, 1 + tokens, or tokens if the cascade is empty): the entries in question, in order.
    accepts : array
        (tokens,), bool: whether a token that comes becomes the newest entry; else it competes with that.
    """
    import torch

    begins = np.concatenate([np.ones(columns.shape[1] - len(accepts), bool), accepts])
    place = torch.from_numpy(begins.cumsum() - 1).to(columns.device).expand(columns.shape)
    own = scores.gather(1, columns)
    empty = own.new_full((len(own), int(begins.sum())), float("-inf"))
    best = empty.scatter_reduce(1, place, own, "amax").gather(1, place)
    none = columns.new_full(empty.shape, -1)
    return none.scatter_reduce(1, place, torch.where(own == best, columns, -1), "amax")
