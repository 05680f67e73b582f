"""Who goes when a tier is full: one policy per file."""

from __future__ import annotations

from cakekv.errors import BadInput
from cakekv.store.eviction.base import Eviction
from cakekv.store.eviction.keep_the_tail import KeepTheTail
from cakekv.store.eviction.lfu import LeastFrequentlyUsed
from cakekv.store.eviction.lru import LeastRecentlyUsed

POLICIES: dict[str, type[Eviction]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, LeastFrequentlyUsed, KeepTheTail)
}


def policy_named(name: str) -> Eviction:
    """Raises `BadInput` if there is no such policy."""
    if name not in POLICIES:
        raise BadInput(f"unknown eviction policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
