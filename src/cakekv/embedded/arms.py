"""What all restores of a `Cake` share: its options, the model, the loader, and what compute and tiers cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Self

from cakekv.calibration import KnownCosts
from cakekv.codec.coder import ChunkCoder
from cakekv.embedded.arbiter import Arbiter
from cakekv.embedded.coders import Coders
from cakekv.embedded.loader import Loader
from cakekv.engine.base import Cache, Engine, Logits
from cakekv.errors import BadInput, UnknownRotation, UnsupportedEngine, UnsupportedModel
from cakekv.load.pieces import layer_groups
from cakekv.load.staging import StagingPool
from cakekv.options import CakeOptions
from cakekv.restore.costs import ComputeCost
from cakekv.restore.flights import Tier
from cakekv.reuse.blend import Blend
from cakekv.rotation import Rotation
from cakekv.store.base import Store, distinct_names


@dataclass(frozen=True)
class Arms(Generic[Cache, Logits]):
    """Both arms, compute and I/O, and what either costs.

    Attributes
    ----------
    options : CakeOptions
        What the `Cake` was told.
    engine : Engine
        The model.
    coder : ChunkCoder
        What a chunk looks like, and how it is decoded.
    arbiter : Arbiter
        Whose turn it is; its lock guards the costs.
    loader : Loader
        Loads from the tiers.
    groups : list of range
        The layers of each group of a layered finish; at most one for none.
    rotations : sequence of Rotation or None
        How each layer's keys are turned, if documents are reused that way.
    compute_cost : ComputeCost
        What spans cost; learns.
    tiers : list of Tier
        The planner's view of the stores' tiers.
    """

    options: CakeOptions
    engine: Engine[Cache, Logits]
    coder: ChunkCoder
    arbiter: Arbiter
    loader: Loader
    groups: list[range]
    rotations: Sequence[Rotation] | None
    compute_cost: ComputeCost
    tiers: list[Tier]

    @classmethod
    def of(
        cls,
        options: CakeOptions,
        engine: Engine[Cache, Logits],
        coder: ChunkCoder,
        staging: StagingPool,
        stores: Sequence[Store],
        costs: KnownCosts,
    ) -> Self:
        """Make what is missing. Each of `stores` is a tier, with its `costs`; `staging` has buffers for chunks."""
        arbiter = Arbiter(options.policy)
        groups = layer_groups(coder.expected([]), coder.layers) if options.layered_finish else []
        coders = Coders(coder, engine.layout)
        loader = Loader(arbiter, stores, coders, engine.layout.unwindowed, groups, staging, engine.decoder(coder))
        tiers = [
            Tier(name, cost, store.parallel_reads)
            for name, store, cost in zip(distinct_names(stores), stores, costs.loads, strict=True)
        ]
        return cls(options, engine, coder, arbiter, loader, groups, _rotations(options, engine), costs.compute, tiers)

    def hangs(self, tier: int) -> bool:
        """Whether a tier does not answer any more."""
        with self.arbiter.lock:
            return self.loader.hangs(tier)


def _rotations(options: CakeOptions, engine: Engine[Cache, Logits]) -> Sequence[Rotation] | None:
    """How a model's keys are turned, if documents are reused that way; raises `BadInput` if it cannot be told."""
    reuse = options.reuse
    if reuse is None or not reuse.turns:
        return None
    try:
        rotations = engine.turnable()
    except UnknownRotation as error:
        raise BadInput(
            f"reuse {reuse.name} turns keys to where documents stand, and this model's cannot be: {error}. "
            "Give no reuse: prompts are computed, and their prefixes restored"
        ) from error
    if isinstance(reuse, Blend):
        if options.codec.drops:
            raise BadInput(
                "reuse blend looks at all of a document, of which chunks that compress makes smaller at store have not "
                "everything: give reuse epic, or a compress that acts later"
            )
        try:
            engine.blendable(reuse)
        except (UnsupportedEngine, UnsupportedModel) as error:
            raise BadInput(
                f"reuse blend computes single positions again, and this model's cannot be: {error}. Give reuse epic, "
                "or none: prompts are computed, and their prefixes restored"
            ) from error
    return rotations
