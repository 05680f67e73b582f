"""Names for what sessions are about: words that most tokenizers have as one token."""

from __future__ import annotations

import random

_NOUNS = (
    "actor agent angel animal apple arrow artist atom baby ball band bank bath beam bean bear bell bench bill bird "
    "blood boat bolt bone book branch bread bridge brush bucket button camera canvas card cart castle cell chain "
    "chair chart child circle city clay clock cloud coal coast coat coin cookie corn court cube deck dish disk doctor "
    "dollar door dream dust earth edge engine face farm father field film finger fire fish flag floor flower food "
    "forest fruit game gate girl glass gold grain grass guard hair hall hand heart hill hole hook horn horse house "
    "iron jack king lake leaf letter lion lock machine market mask meal meat milk mill money moon mother motor mouse "
    "mouth museum music nail neck nest ocean office orange organ owl paper park phone photo pine pipe planet plant "
    "plate pool port radio rail rain ranch rice ring river road robe robot rock room root rose salt sand school "
    "screen seat seed shell shield ship shirt shop shore snake snow sock soil song soup space star station stick "
    "stone store storm story street student sugar summer table tail teacher torch tower town train tree tube voice "
    "wall water wave wheel window wine wing winter wire wolf wood worm yard"
)
_KINDS = "small large old new cold warm round flat soft dark bright tall thin heavy clean dry"


def names(rng: random.Random, count: int) -> list[str]:
    """So many different names, of one word each if there are so many."""
    pool = _NOUNS.split()
    while len(pool) < count:
        pool = of_kinds(pool)
    return rng.sample(pool, count)


def of_kinds(things: list[str]) -> list[str]:
    """Each thing once for every kind: "small apple"."""
    return [f"{kind} {thing}" for kind in _KINDS.split() for thing in things]
