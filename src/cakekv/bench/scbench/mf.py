"""Math.Find: arrays of numbers; asked for is the most frequent number of one, which none of its parts shows."""

from __future__ import annotations

import random
from collections import Counter
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import same_number
from cakekv.bench.scbench.words import names

_SHARE = 0.6
_FEWEST = 5


class MathFind(Task):
    """Numbers have two digits, and about 60 % of an array's are the same one."""

    name: ClassVar[str] = "mf"
    most: ClassVar[int] = 5

    def write(self, rng: random.Random, entries: int) -> Written:
        arrays = {}
        for name in names(rng, SHOTS + TURNS):
            often = rng.randrange(10, 100)
            arrays[name] = [
                often if rng.random() < _SHARE else rng.randrange(10, 100) for _ in range(max(entries, _FEWEST))
            ]
        lines = [f"{name}: {', '.join(map(str, array))}" for name, array in arrays.items()]
        return Written(
            "\n".join(lines),
            [
                Question(f"The most frequent number of {name} is", str(Counter(arrays[name]).most_common(1)[0][0]))
                for name in rng.sample(sorted(arrays), SHOTS + TURNS)
            ],
        )

    def score(self, said: str, gold: str) -> float:
        return same_number(said, gold)
