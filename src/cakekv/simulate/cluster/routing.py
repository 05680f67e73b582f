"""Which node serves a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Routing = Literal["prefix", "least-loaded"]
ROUTINGS: tuple[Routing, ...] = ("prefix", "least-loaded")


class Router:
    """Keeps account of when each node will be through with what it was given, and of who has which prefix in RAM.

    Parameters
    ----------
    nodes : int
        How many there are.
    routing : {"prefix", "least-loaded"}
        "least-loaded" proposes the node that is free first; "prefix" also the one that last served the longest known
        part of the prompt.
    """

    def __init__(self, nodes: int, routing: Routing) -> None:
        self.free_at = np.zeros(nodes)
        """Per node, in seconds: when the work it was given should be done."""
        self._routing = routing
        self._served_by: dict[int, int] = {}

    def candidates(self, blocks: Sequence[int]) -> list[int]:
        """The nodes to choose from for a prompt with these blocks."""
        idlest = int(self.free_at.argmin())
        holder = next((node for block in reversed(blocks) if (node := self._served_by.get(block)) is not None), idlest)
        return [idlest] if holder == idlest else [idlest, holder]

    def served(self, blocks: Sequence[int], node: int) -> None:
        """A prompt with these blocks is now in the node's RAM."""
        if self._routing == "prefix":
            self._served_by.update(dict.fromkeys(blocks, node))
