"""What goes when a tier is full: one policy per file."""

from __future__ import annotations

from cakekv.errors import BadInput
from cakekv.store.eviction.base import Eviction
from cakekv.store.eviction.fifo import FirstInFirstOut
from cakekv.store.eviction.keep_the_tail import KeepTheTail
from cakekv.store.eviction.lfu import LeastFrequentlyUsed
from cakekv.store.eviction.lookahead import LookAhead
from cakekv.store.eviction.lru import LeastRecentlyUsed
from cakekv.store.eviction.s3fifo import SmallMainGhost

POLICIES: dict[str, type[Eviction]] = {
    policy.name: policy
    for policy in (LeastRecentlyUsed, FirstInFirstOut, LeastFrequentlyUsed, SmallMainGhost, LookAhead, KeepTheTail)
}


def policy_named(name: str) -> Eviction:
    """A new policy, which knows of no chunk yet; raises `BadInput` if there is none of that name."""
    if name not in POLICIES:
        raise BadInput(f"unknown eviction policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
