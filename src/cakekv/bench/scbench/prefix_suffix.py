"""Retr.PrefixSuffix: a list of strings; asked for is the one that has both a prefix and a suffix."""

from __future__ import annotations

import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import contains
from cakekv.bench.scbench.words import names

_SUFFIXES = 12


class PrefixSuffix(Task):
    """Two words with a number between them. Each suffix has several strings, and every eighth shares its prefix."""

    name: ClassVar[str] = "prefix_suffix"
    most: ClassVar[int] = 24

    def write(self, rng: random.Random, entries: int) -> Written:
        entries = max(entries, SHOTS + TURNS)
        prefixes = names(rng, entries - entries // 8)
        prefixes += rng.sample(prefixes, entries - len(prefixes))
        suffixes = names(rng, _SUFFIXES)
        ends: dict[tuple[str, str], str] = {}
        for prefix in prefixes:
            suffix = rng.choice([one for one in suffixes if (prefix, one) not in ends])
            ends[prefix, suffix] = f'"{prefix}-{rng.randrange(100, 1000)}-{suffix}"'
        order = rng.sample(sorted(ends), entries)
        asked = rng.sample(order, SHOTS + TURNS)
        return Written(
            "\n".join(ends[one] for one in order),
            [Question(f'"{prefix}-", "-{suffix}":', ends[prefix, suffix]) for prefix, suffix in asked],
        )

    def score(self, said: str, gold: str) -> float:
        return contains(said, gold)
