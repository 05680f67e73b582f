"""An engine whose caches are full of NaN at first."""

from __future__ import annotations

from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine


class Poisoned(TransformersEngine):
    """Hands out caches full of NaN, so that a position that nobody covered cannot go unnoticed."""

    def new_cache(self, capacity: int) -> TwoEndedCache:
        cache = super().new_cache(capacity)
        for layer in cache.stored:
            for region in layer.regions:
                region.fill_(float("nan"))
        return cache
