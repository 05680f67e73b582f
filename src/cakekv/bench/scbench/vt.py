"""Multi-hop tracing: assignments in any order; asked for are all variables that have a value."""

from __future__ import annotations

import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import contains_all
from cakekv.bench.scbench.words import names


class VariableTracing(Task):
    """A value is a variable's, and that one's another's: "sand-rose", "rose-lion". Values are words, too."""

    name: ClassVar[str] = "vt"
    most: ClassVar[int] = 24

    def write(self, rng: random.Random, entries: int) -> Written:
        entries = max(entries, SHOTS + TURNS)
        words = names(rng, 3 * entries)
        values, variables = words[:entries], words[entries:]
        chains = [
            (f'"{value}-{first}"', f'"{first}-{second}"')
            for value, first, second in zip(values, variables[::2], variables[1::2], strict=True)
        ]
        firsts, seconds = (rng.sample(column, entries) for column in zip(*chains, strict=True))
        asked = rng.sample(range(entries), SHOTS + TURNS)
        return Written(
            "\n".join([*firsts, *seconds]),
            [Question(f'"{values[chain]}-":', ", ".join(chains[chain])) for chain in asked],
        )

    def score(self, said: str, gold: str) -> float:
        return contains_all(said, [gold])
