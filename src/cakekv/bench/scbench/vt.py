"""Multi-hop tracing: assignments in any order; asked for is what a variable is, over another one."""

from __future__ import annotations

import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import contains_all
from cakekv.bench.scbench.words import names


class VariableTracing(Task):
    """Each variable is another one, and that a number.

    The original asks for the variables that have a number, which a small model cannot go back to.
    """

    name: ClassVar[str] = "vt"
    most: ClassVar[int] = 16

    def write(self, rng: random.Random, entries: int) -> Written:
        entries = max(entries, SHOTS + TURNS)
        all_names = names(rng, 2 * entries)
        chains = [
            (first, second, str(rng.randrange(1000, 10_000)))
            for first, second in zip(all_names[::2], all_names[1::2], strict=True)
        ]
        values = [f'"{second}": {value}' for _, second, value in chains]
        variables = [f'"{first}": "{second}"' for first, second, _ in chains]
        rng.shuffle(values)
        rng.shuffle(variables)
        asked = rng.sample(chains, SHOTS + TURNS)
        return Written(
            f"{{{', '.join([*values, *variables])}}}",
            [Question(f'"{first}":', f'"{second}": {value}') for first, second, value in asked],
        )

    def score(self, said: str, gold: str) -> float:
        return contains_all(said, [gold])
