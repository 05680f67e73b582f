"""Everything that the cache holds: an ordinary step, to compare others with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cakekv.decode.base import Sight


@dataclass(frozen=True)
class Whole(Sight):
    """All of the cache."""

    name: ClassVar[str] = "whole"
