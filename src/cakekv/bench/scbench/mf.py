"""Math.Find: arrays of numbers; asked for is the most frequent number of one."""

from __future__ import annotations

import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import same_number
from cakekv.bench.scbench.words import names

_LENGTH, _SAME = 8, 6


class MathFind(Task):
    """Six of an array's eight numbers are the same."""

    name: ClassVar[str] = "mf"
    most: ClassVar[int] = 5

    def write(self, rng: random.Random, entries: int) -> Written:
        modes = {name: rng.randrange(10, 100) for name in names(rng, max(entries, SHOTS + TURNS))}
        lines = []
        for name, mode in modes.items():
            array = [mode] * _SAME + [rng.randrange(10, 100) for _ in range(_LENGTH - _SAME)]
            lines.append(f'"{name}-": {", ".join(map(str, rng.sample(array, _LENGTH)))}')
        asked = rng.sample(sorted(modes), SHOTS + TURNS)
        return Written("\n".join(lines), [Question(f'"{name}-mode":', str(modes[name])) for name in asked])

    def score(self, said: str, gold: str) -> float:
        return same_number(said, gold)
