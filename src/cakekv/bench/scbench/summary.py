"""Mix.Sum+NIAH: reports, asked for is the gist of one, then a number in one, by turns."""

from __future__ import annotations

import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import contains, rouge_l
from cakekv.bench.scbench.words import names

_PEOPLE = "Alma Boris Clara Diego Edith Felix Greta Hugo Irene Jonas Karin Louis Maria Oscar Paula Simon"
_JOBS = "baker doctor farmer judge lawyer painter pilot poet sailor singer soldier teacher"
_MONTHS = "January February March April May June July August September October November December"
_FILLER = (
    "It rained for most of the day.",
    "The road was long and the inn was full.",
    "Nobody had expected a guest so late.",
    "There was music in the streets until midnight.",
    "The old bridge had been closed for a year.",
    "Most of the shops were shut by then.",
    "The people of the village told many stories.",
    "A letter was waiting on the table.",
)


class Summary(Task):
    """A report begins with its gist: who, as what, when, with what. So ROUGE-L is about facts, not phrases."""

    name: ClassVar[str] = "summary"
    most: ClassVar[int] = 24

    def write(self, rng: random.Random, entries: int) -> Written:
        entries = max(entries, SHOTS + TURNS)
        places, things = names(rng, entries), names(rng, entries)
        reports, questions = [], []
        for place, thing in zip(places, things, strict=True):
            gist = ", ".join([*(rng.choice(ones.split()) for ones in (_PEOPLE, _JOBS, _MONTHS)), thing])
            code = f'"{rng.randrange(100, 1000)}"'
            first, second = rng.sample(_FILLER, 2)
            reports.append(f'Report "{place}-": {gist}. {first} {second} The code of "{place}-" is {code}.')
            questions.append((Question(f'Report "{place}-":', gist), Question(f'The code of "{place}-" is', code)))
        asked = rng.sample(questions, SHOTS + TURNS)
        return Written("\n".join(reports), [both[turn % 2] for turn, both in enumerate(asked)])

    def score(self, said: str, gold: str) -> float:
        return contains(said, gold) if gold[0] == '"' else rouge_l(said, gold)
