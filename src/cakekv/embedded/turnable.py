"""Whether a model's keys can be turned to other positions, and how: found out when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic
from typing import Any

from cakekv.embedded.arms import Arms
from cakekv.errors import UnknownRotation
from cakekv.rotation import Rotation


class Turnable:
    """Asks the engine once for every architecture that its model takes on.

    Parameters
    ----------
    arms : Arms
        The engine, and who lends it.
    """

    def __init__(self, arms: Arms[Any, Any]) -> None:
        self._arms = arms
        self._lock = threading.Lock()
        self._known: dict[str, Sequence[Rotation] | UnknownRotation] = {}

    def rotations(self, architecture: str) -> Sequence[Rotation] | None:
        """How each layer's keys are turned; None if they cannot be."""
        known = self._ask(architecture)
        return None if isinstance(known, UnknownRotation) else known

    def why_not(self, architecture: str) -> str:
        """Why keys cannot be turned; "" if they can."""
        known = self._ask(architecture)
        return f"this model's keys cannot be turned: {known}" if isinstance(known, UnknownRotation) else ""

    def _ask(self, architecture: str) -> Sequence[Rotation] | UnknownRotation:
        """Of the model as it is now, which has this architecture; it computes a few tokens for that."""
        with self._lock:
            known = self._known.get(architecture)
        if known is None:
            arbiter = self._arms.arbiter
            with arbiter.turn(arbiter.request(monotonic())):
                try:
                    known = self._arms.engine.turnable()
                except UnknownRotation as error:
                    known = error
            with self._lock:
                self._known[architecture] = known
        return known
