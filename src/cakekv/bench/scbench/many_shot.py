"""ICL.ManyShot: labelled examples; asked for is the label of something new, whose kind has to be told from them."""

from __future__ import annotations

import random
from typing import ClassVar

from cakekv.bench.scbench.base import SHOTS, TURNS, Question, Task, Written
from cakekv.bench.scbench.scoring import contains
from cakekv.bench.scbench.words import of_kinds

_THINGS = (
    "eagle dolphin horse lion otter owl panda rabbit tiger spider fox pony cat dog wolf bear goat sheep cow pig mouse "
    "frog snake whale shark deer monkey zebra camel duck goose hen crab",
    "apple cherry grape lemon melon olive onion orange potato pumpkin plum honey salt cake pepper bread cheese butter "
    "rice pasta soup carrot banana tomato garlic sugar milk bean corn pizza peach pear",
    "hammer needle brush knife kettle ladder pencil guitar piano flute drum basket bucket bottle button candle carpet "
    "chair clock desk lamp key lock mirror spoon saw drill scissors nail broom shovel fork",
)
_LABELS = ("red", "blue", "green")


class ManyShot(Task):
    """Animals, food and tools, with a colour each. What is asked for is in no example."""

    name: ClassVar[str] = "many_shot"
    most: ClassVar[int] = 10

    def write(self, rng: random.Random, entries: int) -> Written:
        labels = rng.sample(_LABELS, len(_LABELS))
        label_of = {thing: label for things, label in zip(_THINGS, labels, strict=True) for thing in things.split()}
        things = rng.sample(sorted(label_of), len(label_of))
        new, shown = things[: SHOTS + TURNS], things[SHOTS + TURNS :]
        shown += of_kinds(shown)
        examples = [f"{thing} -> {label_of[thing.split()[-1]]}" for thing in shown[:entries]]
        return Written("\n".join(examples), [Question(f"{thing} ->", label_of[thing]) for thing in new])

    def score(self, said: str, gold: str) -> float:
        return contains(said, gold)
