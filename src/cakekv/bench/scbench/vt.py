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
        chains = list(zip(words[::3], words[1::3], words[2::3], strict=True))
        firsts = [f'"{value}-{first}"' for value, first, _ in chains]
        seconds = [f'"{first}-{second}"' for _, first, second in chains]
        lines = [*rng.sample(firsts, entries), *rng.sample(seconds, entries)]
        asked = rng.sample(chains, SHOTS + TURNS)
        return Written("\n".join(lines), [Question(f'"{chain[0]}-":', f'"{"-".join(chain)}"') for chain in asked])

    def score(self, said: str, gold: str) -> float:
        return contains_all(said, [gold])
