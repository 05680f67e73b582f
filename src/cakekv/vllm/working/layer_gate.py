"""A layered step on a worker: before each layer, its forward pass waits for that layer's part of the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from cakekv.vllm.working.load_pool import LoadPool


class LayerGate:
    """Holds one forward pass up.

    vLLM cannot give a forward pass up. So one that lacks something goes on with whatever lies in the cache, and is
    `lost`: the scheduler throws its output away and has it computed again.

    Parameters
    ----------
    loads : LoadPool
        Where the loads go on.
    awaited : sequence of sequences of int
        Per group of layers, the loads that must be in place.
    patience_s : float
        Seconds after which the pass waits no more.
    """

    def __init__(self, loads: LoadPool, awaited: Sequence[Sequence[int]], patience_s: float) -> None:
        self._loads = loads
        self._awaited = awaited
        self._until = monotonic() + patience_s
        self._passed = 0
        """Groups that may be computed."""
        self.waited_s = 0.0
        self.lost = False

    def wait(self, group: int) -> None:
        """Wait until this group of layers, and those before it, may be computed."""
        while self._passed <= group and not self.lost:
            began = monotonic()
            self.lost = not self._loads.wait(self._awaited[self._passed], self._until)
            self.waited_s += monotonic() - began
            self._passed += 1

    def close(self) -> None:
        """The pass is over: if vLLM did not ask for every group, it did not wait for all it needed."""
        self.lost = self.lost or self._passed < len(self._awaited)
