"""EPIC (arXiv 2410.15332): documents computed by themselves are placed anywhere; the first tokens of each are linked.

A document's first tokens have learned to be attention sinks, which they should not be in the midst of a prompt. So
LegoLink computes them again where they stand, seeing all that is before them; the rest is placed with its keys turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.errors import BadInput
from cakekv.prompt import Place
from cakekv.reuse.base import Reuse

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Epic(Reuse):
    """LegoLink.

    Parameters
    ----------
    link : int
        So many tokens at the beginning of every document are computed where it stands.

    Raises
    ------
    BadInput
        `link` is out of range.
    """

    name: ClassVar[str] = "epic"
    link: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.link, bool) or not isinstance(self.link, int) or not 0 <= self.link <= _MOST:
            raise BadInput(f"reuse epic: link is {self.link!r}, but must be a whole number of 0 or more tokens")

    def recomputed(self, document: Place) -> range:
        return range(document.start, min(document.start + self.link, document.end))


@dataclass(frozen=True)
class Turned(Reuse):
    """Keys are turned to where they are placed, and nothing is linked: what EPIC begins from."""

    name: ClassVar[str] = "turned"

    def recomputed(self, document: Place) -> range:
        return range(document.start, document.start)


@dataclass(frozen=True)
class Naive(Turned):
    """Keys stay as they were computed, as if they stood at the beginning: only good to compare with."""

    name: ClassVar[str] = "naive"

    @property
    def turns(self) -> bool:
        return False
