"""Bases for codecs that have to learn a model: of made-up planes, or of a tiny model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cakekv.codec.base import Codec, Plane
from cakekv.codec.basis import Basis, basis_file, write_basis
from cakekv.codec.kvtc import Kvtc
from cakekv.codec.learning import Learner, Seen
from cakekv.layout import KVLayout

if TYPE_CHECKING:
    from cakekv.engine.transformers import TransformersEngine


def ready(codec: Codec, planes: Iterable[Plane]) -> Codec:
    """A codec that can encode these planes: if it has to learn, from made-up ones of the same shapes."""
    if not isinstance(codec, Kvtc):
        return codec
    return codec.with_basis(_basis(tuple((plane.role, plane.layer, plane.heads, plane.width) for plane in planes)))


def planes_of(layout: KVLayout) -> list[Plane]:
    return [
        Plane("values" if index else "keys", layer, len(layout.layers), plane.heads, 1, plane.width)
        for layer, kept in enumerate(layout.layers)
        for index, plane in enumerate(kept.planes)
    ]


@lru_cache(maxsize=100)
def _basis(shapes: tuple[tuple[str, int, int, int], ...]) -> Basis:
    rng, learner = np.random.default_rng(3), Learner()
    for role, layer, heads, width in shapes:
        shape = (heads, 300, width)
        spread, mean = rng.uniform(0.1, 4, (heads, 1, width)), rng.uniform(-6, 6, (heads, 1, width))
        elements = (rng.standard_normal(shape) * spread + mean).astype(np.float32)
        learner.see(role, layer, Seen(elements, rng.standard_normal(shape).astype(np.float32)))
    return Basis.from_bytes(learner.basis().to_bytes())


def learn_model(engine: TransformersEngine, seed: int = 0) -> Basis:
    """Learn a basis of a tiny model, from random tokens, and keep it where the model's codecs look."""
    from cakekv.codec.learning import learn
    from cakekv.engine.sensitivity import look_at

    texts = np.random.default_rng(seed).integers(0, engine.vocabulary_size, (3, 120)).tolist()
    data = learn(look_at(engine, text, 40, seed) for text in texts).to_bytes()
    write_basis(data, [basis_file(name) for name in engine.weights_names()])
    return Basis.from_bytes(data)
