"""Retr.KV: a JSON object of random pairs; asked for is the value of a key."""

from __future__ import annotations

import json
import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import contains
from cakekv.bench.scbench.words import names


class KeyValue(Task):
    """Keys are names, values have four digits."""

    name: ClassVar[str] = "kv"
    most: ClassVar[int] = 16

    def write(self, rng: random.Random, entries: int) -> Written:
        pairs = {name: rng.randrange(1000, 10_000) for name in names(rng, max(entries, SHOTS + TURNS))}
        asked = rng.sample(sorted(pairs), SHOTS + TURNS)
        return Written(json.dumps(pairs), [Question(f'"{key}":', str(pairs[key])) for key in asked])

    def score(self, said: str, gold: str) -> float:
        return contains(said, gold)
