"""LESS (arXiv 2402.09398): the first tokens and the newest, and a small state that stands for all that were let go of.

A token that leaves the cache is added to two sums per head of keys: of a few features of its key, and of their products
with its value. Attention weighs what these sums give against what it finds in the cache, as one softmax would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cakekv.compress.base import Layer, Merged, Method
from cakekv.compress.sink_recent import SinkRecent
from cakekv.decode.base import Sight
from cakekv.errors import BadInput

if TYPE_CHECKING:
    import torch

    from cakekv.decode.less_kernels import Kernels, Learned, State
    from cakekv.engine.tap import Attending

_MEMO = "less"


@dataclass(frozen=True)
class Less(Sight):
    """Needs kernels, which `cakekv less train` learns from a model; those of the demo's model come with the package.

    Parameters
    ----------
    sinks : int
        So many of the first tokens are kept.
    recent : int
        So many of the newest tokens are kept.
    """

    if TYPE_CHECKING:
        _learned: ClassVar[Learned | None]  # of an instance, in truth, but no parameter

    name: ClassVar[str] = "less"
    sinks: int = 4
    recent: int = 124

    def __post_init__(self) -> None:
        self.check("sinks", 0 <= self.sinks < 2**31, "0 or more tokens")
        self.check("recent", 0 < self.recent < 2**31, "1 or more tokens")
        self._bind(None)

    def _bind(self, learned: Learned | None) -> None:
        object.__setattr__(self, "_learned", learned)

    def for_model(self, names: Iterable[str]) -> Less:
        """The same with the kernels learned from a model. Raises `BadInput` if there are none."""
        if self._learned is not None:
            return self
        from cakekv.decode.less_kernels import find_kernels

        return self.with_kernels(find_kernels(names))

    def with_kernels(self, learned: Learned) -> Less:
        """The same, with these kernels."""
        bound = Less(self.sinks, self.recent)
        bound._bind(learned)
        return bound

    @property
    def method(self) -> Method:
        return _Folding(SinkRecent(sinks=self.sinks, recent=self.recent))

    def prepare(self, layers: Sequence[Layer]) -> None:
        if self._learned is None:
            raise BadInput("decode less has no kernels yet: give it those of the model, by for_model or with_kernels")
        for layer in layers:
            kernels = self._learned.layers.get(layer.index)
            heads, _, width = layer.keys.shape
            if kernels is None or kernels.key_in.shape[:2] != (heads, width):
                raise BadInput(
                    f"decode less: its kernels are of another model than this one, whose layer {layer.index} has "
                    f"{heads} heads of {width} elements: run cakekv less train"
                )
            layer.memo[_MEMO] = _Memo(kernels.to(layer.keys.device))

    def attend(self, layer: Layer, attending: Attending, mask: torch.Tensor | None) -> torch.Tensor:
        from cakekv.decode.less_kernels import attention

        memo: _Memo = layer.memo[_MEMO]
        if memo.state is None:
            return super().attend(layer, attending, mask)
        queries = attending.query[0]
        seen = None if mask is None else mask[0]
        output, log_sum = attention(queries, layer.keys, layer.values, seen, attending.scaling, attending.softcap)
        joined = memo.kernels.joined(queries, output, log_sum, memo.state)
        return joined.to(attending.query.dtype).transpose(0, 1)[None]


@dataclass
class _Memo:
    """What is known of a layer of one sequence."""

    kernels: Kernels
    state: State | None = None


@dataclass(frozen=True)
class _Folding(Method):
    """Lets go of what a policy lets go of, and adds it to the state."""

    name: ClassVar[str] = "less"
    times: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})
    policy: SinkRecent

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return self.policy.keep(layers)

    def step(self, layer: Layer) -> torch.Tensor | None:
        return self.policy.step(layer) if _MEMO in layer.memo else None  # of a layer with a window, all is kept

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
        memo: _Memo = layer.memo[_MEMO]
        state = memo.kernels.state(layer.keys, layer.values, layer.present & ~kept)
        memo.state = state if memo.state is None else memo.state + state
        return None
