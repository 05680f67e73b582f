"""The tiers of a simulated cluster: what they hold, and how fast they deliver."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from cakekv.errors import BadInput
from cakekv.quantities import parse_bandwidth, parse_bytes


class TierSize(NamedTuple):
    """Capacity in bytes, bandwidth to each node in bytes per second."""

    capacity: int
    bandwidth: float


class Tiers(NamedTuple):
    """Every node has its own RAM; the remote tier is shared by all, each node reading at its own link's bandwidth."""

    ram: TierSize
    remote: TierSize


def parse_tiers(text: str) -> Tiers:
    """Tiers as written on the command line: "ram=64GB@200Gbps,remote=10TB@25Gbps"; one that is left out holds nothing.

    Raises
    ------
    BadInput
        A tier has another name, is named twice, or its capacity or bandwidth is malformed.
    """
    found: dict[str, TierSize] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        capacity, at, bandwidth = size.partition("@")
        if name not in Tiers._fields or not equals or not at or name in found:
            raise BadInput(f'{part!r} is not a tier: write them as "ram=64GB@200Gbps,remote=10TB@25Gbps", each once')
        rate = parse_bandwidth(bandwidth)
        if rate is None:
            raise BadInput(f"the {name} tier needs a bandwidth with a limit, not {bandwidth!r}")
        found[name] = TierSize(parse_bytes(capacity), rate)
    nothing = TierSize(0, 1.0)
    return Tiers(found.get("ram", nothing), found.get("remote", nothing))


class BlockCache:
    """Which blocks a tier holds; the least recently used ones make room.

    Parameters
    ----------
    capacity : int
        In blocks.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def run(self, blocks: Sequence[int], start: int = 0) -> int:
        """Where the run of blocks that the tier holds from `start` on ends."""
        held = self._blocks
        for place in range(start, len(blocks)):
            if blocks[place] not in held:
                return place
        return len(blocks)

    def store(self, blocks: Sequence[int]) -> None:
        """Hold these blocks of one prompt. The last of them go first again: they are of no use without those before."""
        held = self._blocks
        for block in reversed(blocks):
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
        while len(held) > self._capacity:
            held.popitem(last=False)
