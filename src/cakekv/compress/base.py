"""The contract of a method that keeps fewer tokens: which rows of each layer survive, and what becomes of the others.

A method is one file. The shortest is `sink_recent`; a method that looks at attention is `heavy_hitter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from cakekv.errors import BadInput
from cakekv.keys import canonical
from cakekv.recipes import recipe_of
from cakekv.rotation import Rotation

if TYPE_CHECKING:
    import torch

ALL = -1
"""As `Method.rows`: every row of the prompt's attention."""
TIMES = ("store", "prefill", "decode")
"""When a method can act: on chunks as they are saved; on a prompt's cache once it is complete; on every step of an
answer."""


class Marked(NamedTuple):
    """Positions of a prompt that somebody has marked: a question, an image."""

    start: int
    end: int
    what: str
    """"question", "image", or whatever a processor calls its modality."""


@dataclass
class Layer:
    """One layer's cache of one sequence, as a method sees it. Methods change nothing of it but `memo`.

    Entries of a head are in the order of their positions. Heads may have different entries; where a head has none, its
    position is -1.

    Attributes
    ----------
    index, layers : int
        Which of how many layers that keep keys and values.
    keys, values : Tensor
        (kv_heads, entries, width). Keys are as the model caches them: after RoPE, in most.
    positions : Tensor
        (kv_heads, entries), int64: where each entry stood in the text; -1 for none.
    length : int
        Tokens of the sequence so far, whether kept or not; of a chunk that is being saved, up to its end.
    queries : Tensor or None
        (heads, rows, width), as attention gets them: of the newest `rows` tokens, as many as the method asks for.
        None for a chunk that is being saved.
    query_positions : Tensor or None
        (rows,): where they stand, ascending.
    scaling : float
        What the model multiplies products of queries and keys with.
    bias : Tensor or None
        (kv_heads, entries), added to the logits of attention.
    total : Tensor or None
        (heads, entries): attention received from all rows so far, if `Method.rows` is `ALL`.
    marked : sequence of Marked
        Of the prompt.
    rotation : Rotation or None
        How keys are turned by their positions; None if that is not known.
    memo : dict
        For the method to keep what it wants of this layer, until the sequence ends.
    """

    index: int
    layers: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    length: int
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    bias: torch.Tensor | None = None
    total: torch.Tensor | None = None
    marked: Sequence[Marked] = ()
    rotation: Rotation | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        return int(self.keys.shape[0])

    @property
    def entries(self) -> int:
        """Entries of the head that has most."""
        return int(self.keys.shape[1])

    @property
    def present(self) -> torch.Tensor:
        """(kv_heads, entries), bool: where there is an entry."""
        return self.positions >= 0

    def newest(self, count: int) -> torch.Tensor:
        """(kv_heads, entries), bool: the entries of the newest `count` tokens of the sequence."""
        return self.positions >= max(0, self.length - count)

    def first(self, count: int) -> torch.Tensor:
        """(kv_heads, entries), bool: the entries of the first `count` tokens of the sequence."""
        return (self.positions >= 0) & (self.positions < count)

    def visible(self) -> torch.Tensor:
        """(kv_heads, rows, entries), bool: what each of the queries sees."""
        assert self.query_positions is not None, "there are no queries of a chunk that is being saved"
        return self.present[:, None] & (self.positions[:, None] <= self.query_positions[None, :, None])

    def by_rows(self, rows: int = 64) -> Iterator[Layer]:
        """The layer with so many of its queries at a time: all rows of attention at once may take too much memory."""
        assert self.queries is not None, "there are no queries of a chunk that is being saved"
        assert self.query_positions is not None
        for begin in range(0, len(self.query_positions), rows):
            part = slice(begin, begin + rows)
            yield replace(self, queries=self.queries[:, part], query_positions=self.query_positions[part])

    def attention(self, last: int | None = None) -> torch.Tensor:
        """Rows of attention, worked out anew from queries and keys.

        Parameters
        ----------
        last : int or None
            Only of the newest so many queries.

        Returns
        -------
        Tensor
            (kv_heads, queries per kv head, rows, entries), float32; every row sums to 1.
        """
        import torch

        assert self.queries is not None, "there are no queries of a chunk that is being saved"
        queries, seen = self.queries, self.visible()
        if last is not None:
            queries, seen = queries[:, -last:], seen[:, -last:]
        grouped = queries.float().view(self.heads, -1, *queries.shape[1:])
        logits = torch.einsum("hgrd,hed->hgre", grouped, self.keys.float()) * self.scaling
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.bias is not None:
            logits += self.bias[:, None, None].float()
        return logits.masked_fill_(~seen[:, None], float("-inf")).softmax(-1)

    def received(self, last: int | None = None) -> torch.Tensor:
        """Attention that every entry received, summed over rows, meaned over the queries of a head of keys.

        Returns
        -------
        Tensor
            (kv_heads, entries), float32. Of all rows so far if the method asked for `ALL`, and `last` is None.
        """
        if self.total is not None and last is None:
            return self.total.view(self.heads, -1, self.total.shape[1]).mean(1)
        return self.attention(last).mean(1).sum(1)


class Strides(NamedTuple):
    """How a method takes a text of any length: so many tokens at once, over what is left of those before."""

    entries: int
    """How many of a head are left at most."""
    tokens: int
    """Of a stride."""
    always: bool = False
    """Whether prompts are taken so that would fit into the model's context, too."""


class Merged(NamedTuple):
    """What becomes of entries, besides that some are dropped. Shapes as before dropping."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    """(kv_heads, entries): added to the logits of attention from now on."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to keep fewer tokens. Its fields are its parameters.

    Attributes
    ----------
    times : frozenset of str
        Of `TIMES`: when it can act.
    compact : bool
        Whether entries move up to consecutive positions, their keys turned, so that a text may be longer than the
        model's context. Else they keep the positions that they had.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Grows whenever the same parameters keep something else."""
    times: ClassVar[frozenset[str]] = frozenset({"prefill"})
    compact: ClassVar[bool] = False

    @property
    def at(self) -> frozenset[str]:
        """When it acts, with these parameters."""
        return self.times - {"store"}

    @property
    def rows(self) -> int:
        """How many of the prompt's last queries it wants to see: 0 for none, or `ALL`."""
        return 0

    @property
    def stride(self) -> int:
        """At `decode`: so many tokens of an answer come between two calls of `step`."""
        return 1

    @property
    def strides(self) -> Strides | None:
        """Of a method that is `compact` and acts at `decode`: how it takes texts of any length; None: it does not."""
        return None

    @abstractmethod
    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        """Which entries of a prompt's cache survive.

        At `store`, it is asked of each chunk by itself: `layers` are those of the chunk, and have no queries.

        Returns
        -------
        sequence of Tensor or None
            Of each layer, (kv_heads, entries), bool; None: all of them. At least one entry of every head survives.
        """

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
        """What becomes of entries that do not survive `keep` or `step`; None: they are dropped."""
        return None

    def step(self, layer: Layer) -> torch.Tensor | None:
        """At `decode`: which entries go on, once `stride` tokens more are in the cache; None: all of them.

        The layer's `queries` are those of these tokens, one per token.
        """
        return None

    def check(self, field: str, holds: bool, wanted: str) -> None:
        """Raise `BadInput`, which names the field, unless something `holds` of it."""
        if not holds:
            raise BadInput(f"compress {self.name}: {field} is {getattr(self, field)}, but must be {wanted}")

    def check_at_store(self, *names: str) -> None:
        """Raise `BadInput` if parameters of these names are given, which mean nothing at store."""
        defaults = {one.name: one.default for one in fields(self)}
        if given := [name for name in names if getattr(self, name) != defaults[name]]:
            raise BadInput(
                f"compress {self.name}: nothing comes of {' and '.join(given)} with when=store, because chunks are "
                "stored each by itself, and without attention: leave that out, or give when=prefill"
            )

    @property
    def recipe(self) -> str:
        """Its name with its parameters, as `cakekv.compress.method_named` reads it."""
        return recipe_of(self.name, self)

    @property
    def fingerprint(self) -> str:
        """Names the method and all that decides what it keeps, as stable text."""
        return canonical({"compress": self.name, "version": self.version, **asdict(self)})


def top(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Where the greatest `count` of each row's scores are; of equal ones, those that come later.

    Parameters
    ----------
    scores : Tensor
        (kv_heads, entries).
    count : int or Tensor
        For all heads, or (kv_heads,).
    """
    import torch

    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    counts = count[:, None] if isinstance(count, torch.Tensor) else count
    return (rank < counts).flip(-1)
