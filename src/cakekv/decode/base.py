"""The contract of a sight: what the queries of an answer's tokens attend to, of all that a cache holds.

A sight is one file. Nothing is let go of: what one step does not see, the next may. The shortest is `whole`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from cakekv.compress.base import Layer, Method
from cakekv.errors import BadInput
from cakekv.recipes import recipe_of

if TYPE_CHECKING:
    import torch

    from cakekv.decode.sidecar import Sidecar
    from cakekv.engine.ragged import RaggedCache
    from cakekv.engine.tap import Attending
    from cakekv.keys import ChunkKey
    from cakekv.layout import KVLayout, PlaneLayout


class View(NamedTuple):
    """What a layer's queries attend to."""

    keys: torch.Tensor
    """(1, kv_heads or heads, entries, width)"""
    values: torch.Tensor
    mask: torch.Tensor | None
    """(1, 1 or heads, tokens, entries): True where a query attends, or a float that is added to its logits; None: to
    everything."""


@dataclass(frozen=True)
class Sight(ABC):
    """What a decode step sees. Its fields are its parameters; what it knows of a sequence is in `Layer.memo`."""

    name: ClassVar[str]
    speculates: ClassVar[bool] = False
    """Whether tokens are drafted from a cheaper view; then it has a field `gamma`, and `hold` returns a cache that can
    do so (see `cakekv.embedded.speculating`)."""

    @property
    def rows(self) -> int:
        """As `Method.rows`, for `prepare`."""
        return 0

    @property
    def method(self) -> Method | None:
        """What lets go of entries beside it; None: nothing does."""
        return None

    def beside(self, keys: Sequence[ChunkKey], chunk_tokens: int) -> list[Sidecar]:
        """What is stored beside a prompt's chunks, of what `prepare` works out: in `Layer.memo`, as `spans`, by end.

        Parameters
        ----------
        keys : sequence of ChunkKey
            Of the prompt's full chunks.
        chunk_tokens : int
            Tokens of each.
        """
        return []

    def groups_layer(self, index: int) -> bool:
        """Whether there is something beside chunks of a layer, if that sees everything."""
        return False

    @property
    def budget(self) -> int:
        """Tokens that a query sees, if they are limited; else 0."""
        return 0

    @property
    def lazy(self) -> bool:
        """Whether what is `beside` has rows, of which a first token reads those that its queries select."""
        return False

    def beside_bytes(self, plane: PlaneLayout) -> float:
        """About how many bytes there are `beside` a token, rows apart, of a layer with groups whose keys are so."""
        return 0.0

    def groups_beside(self, tokens: int) -> int:
        """How many groups a head has of so many tokens that something is `beside`."""
        return 0

    def check_chunks(self, chunk_tokens: int, layout: KVLayout) -> None:  # noqa: B027  # some store nothing
        """Raise `BadInput` unless what is stored beside chunks of so many tokens suits them, and the model."""

    def for_model(self, names: Iterable[str]) -> Sight:
        """The same with what was learned of a model, for one that has to learn; as `Codec.for_model`.

        Parameters
        ----------
        names : iterable of str
            As `Engine.weights_names`.

        Raises
        ------
        BadInput
            Nothing was learned of it.
        """
        return self

    def prepare(self, layers: Sequence[Layer]) -> None:  # noqa: B027  # some need nothing
        """Look at a prompt's complete cache, before the first step: of each layer that sees everything."""

    def hold(self, cache: RaggedCache) -> RaggedCache:
        """What the steps go on with, once all is prepared: a copy of a view of a prompt's cache."""
        cache.own()
        return cache

    def view(self, layer: Layer, mask: torch.Tensor | None) -> View:
        """What the newest tokens attend to.

        Parameters
        ----------
        layer : Layer
            With the newest tokens' `queries`; their keys and values are its last entries.
        mask : Tensor or None
            What they may see at all, as in `View`.
        """
        return View(layer.keys[None], layer.values[None], mask)

    def attend(self, layer: Layer, attending: Attending, mask: torch.Tensor | None) -> torch.Tensor:
        """What attention returns: (1, tokens, heads, width). For a sight that adds something of its own to a view."""
        return attending.attend(*self.view(layer, mask))

    def check(self, field: str, holds: bool, wanted: str) -> None:
        """Raise `BadInput`, which names the field, unless something `holds` of it."""
        if not holds:
            raise BadInput(f"decode {self.name}: {field} is {getattr(self, field)}, but must be {wanted}")

    @property
    def recipe(self) -> str:
        """Its name with its parameters, as `cakekv.decode.sight_named` reads it."""
        return recipe_of(self.name, self)
