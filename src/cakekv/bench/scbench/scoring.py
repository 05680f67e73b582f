"""How answers are judged: the rules of SCBench."""

from __future__ import annotations

import re
from collections.abc import Iterable


def contains(said: str, gold: str) -> float:
    """1 if the gold answer is anywhere in what was said, whatever the case of its letters."""
    return float(gold.lower() in said.lower())


def contains_all(said: str, names: Iterable[str]) -> float:
    """1 if all names are, as words."""
    words = set(re.findall(r"\w+", said.lower()))
    return float(all(set(re.findall(r"\w+", name.lower())) <= words for name in names))


def same_number(said: str, gold: str) -> float:
    """1 if the first number that was said is the gold one."""
    number = re.search(r"-?\d+(\.\d+)?", said)
    return float(number is not None and float(number[0]) == float(gold))


def rouge_l(said: str, gold: str) -> float:
    """ROUGE-L (Lin, 2004): the F1 of the longest common subsequence of words; letters' case and signs do not count."""
    one, other = (re.findall(r"\w+", text.lower()) for text in (said, gold))
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for at, wanted in enumerate(other):
            row.append(before[at] + 1 if word == wanted else max(row[-1], before[at + 1]))
    return 2 * row[-1] / (len(one) + len(other))
