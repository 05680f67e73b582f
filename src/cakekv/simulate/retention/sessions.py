"""Synthetic conversations: what a trace of one service does not show, with every assumption a number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count

from cakekv.simulate.cluster.trace import BLOCK_TOKENS, Arrival, Trace


@dataclass(frozen=True)
class Sessions:
    """Conversations that begin at random, each about a text of its own, behind one of a few system prompts.

    Lengths and pauses are log-normal with the median given; the number of turns is geometric.

    Parameters
    ----------
    per_s : float
        Conversations that begin per second.
    turns : float
        Turns of a conversation on average.
    pause_s : float
        Median seconds from one turn to the next.
    system_prompts, system_tokens : int
        How many there are, and their length.
    text_tokens, turn_tokens : int
        Medians: of the text that the first turn brings along, and of what every later turn adds (an answer and the
        next question).
    spread : float
        Standard deviation of the logarithms.
    seed : int
        Of everything that is random.
    """

    per_s: float = 2.0
    turns: float = 3.0
    pause_s: float = 60.0
    system_prompts: int = 4
    system_tokens: int = 2048
    text_tokens: int = 6000
    turn_tokens: int = 700
    spread: float = 1.0
    seed: int = 0

    def trace(self, requests: int) -> Trace:
        """The first so many requests."""
        chance = random.Random(self.seed)
        blocks = count()
        shared = [[next(blocks) for _ in range(self.system_tokens // BLOCK_TOKENS)] for _ in range(self.system_prompts)]
        found: list[Arrival] = []
        begins_s = 0.0
        for _ in range(requests):  # more conversations than needed, so that the last ones are as lively as the first
            begins_s += chance.expovariate(self.per_s)
            ids = list(chance.choice(shared))
            tokens = self.system_tokens + self._about(self.text_tokens, chance)
            at = begins_s
            while True:
                ids += [next(blocks) for _ in range(tokens // BLOCK_TOKENS - len(ids))]
                found.append(Arrival(at, tokens, tuple(ids)))
                if chance.random() < 1.0 / self.turns:
                    break
                at += self._about(self.pause_s, chance)
                tokens += self._about(self.turn_tokens, chance)
        found.sort()
        return Trace(found[:requests], found[requests - 1].arrived_s)

    def _about(self, median: float, chance: random.Random) -> int:
        return max(1, round(median * chance.lognormvariate(0.0, self.spread)))
