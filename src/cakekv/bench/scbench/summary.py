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
    """A report's gist is who it is about, as what, when, and with what: so ROUGE-L is about facts alone."""

    name: ClassVar[str] = "summary"
    most: ClassVar[int] = 24

    def write(self, rng: random.Random, entries: int) -> Written:
        entries = max(entries, SHOTS + TURNS)
        places, things = names(rng, entries), names(rng, entries)
        reports, questions = [], []
        for place, thing in zip(places, things, strict=True):
            who, job, month = (rng.choice(ones.split()) for ones in (_PEOPLE, _JOBS, _MONTHS))
            code = str(rng.randrange(1000, 10_000))
            first, second = rng.sample(_FILLER, 2)
            reports.append(
                f"Report of the {place}: {who}, a {job}, came to see the {place} in {month}. {first} {second} "
                f"{who} went home with the {thing}. The code of the {place} is {code}."
            )
            gist = Question(f"The {place} in four words:", f"{who}, {job}, {month}, {thing}")
            questions.append((gist, Question(f"The code of the {place} is", code)))
        asked = rng.sample(questions, SHOTS + TURNS)
        return Written("\n".join(reports), [both[turn % 2] for turn, both in enumerate(asked)])

    def score(self, said: str, gold: str) -> float:
        return contains(said, gold) if gold.isdigit() else rouge_l(said, gold)
