"""Names for what sessions are about: words that most tokenizers have as one token."""

from __future__ import annotations

import random

_NOUNS = (
    "apple arrow badge barn basket beach bell bird boat bone book bottle bridge brush bucket button cabin cake camera "
    "candle canoe carpet castle chain chair cherry clock cloud coat coin comet copper coral cotton cradle crown desk "
    "diamond dolphin door dragon drum eagle engine fabric falcon feather fence field flag flame flute forest fossil "
    "fountain fox garden gate glass glove gold grape guitar hammer harbor hat helmet honey horse island ivory jacket "
    "jewel kettle key kite knife ladder lamp lemon letter lion lock maple marble mask meadow melon mirror moon "
    "mountain needle nest ocean olive onion orange otter owl paint palace panda paper pearl pencil pepper piano pillow "
    "pine planet plum pocket pony potato pumpkin puzzle rabbit ribbon ring river robot rocket rope rose saddle salt "
    "sand shell ship silver spider spoon stone tiger"
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
