"""Whatever is asked of whatever engine over whatever store: answers are plain vLLM's; nothing leaks, hangs or spoils.

`CAKEKV_FUZZ_SEED=7` runs that seed alone; `--long` thousands of requests with new seeds.
"""

from __future__ import annotations

import os
import random
import traceback
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import compare, fuzz_alone

SEEDS = (6, 33, 39)
"""Those of every run."""
ROUNDS, REQUESTS = 2, 18
LONG_SEEDS, LONG_ROUNDS, LONG_REQUESTS = 25, 5, 42


def seeds(long: bool) -> list[int]:
    """What to run."""
    if given := os.environ.get("CAKEKV_FUZZ_SEED"):
        return [int(given)]
    if not long:
        return list(SEEDS)
    first = random.randrange(10**6)
    return list(range(first, first + LONG_SEEDS))


@pytest.mark.timeout(6 * 3600)
def test_answers_are_those_of_plain_vllm(model: Path, long: bool) -> None:
    chosen = seeds(long)
    rounds, requests = (LONG_ROUNDS, LONG_REQUESTS) if long else (ROUNDS, REQUESTS)
    counts, wrong = Counter[str](), []
    for seed in chosen:
        try:
            found = fuzz_alone(model, seed, rounds, requests, 1800 if long else 280)
        except Exception as error:
            wrong.append(f"seed {seed}: {''.join(traceback.format_exception(error))[-4000:]}")
            continue
        print(
            f"seed {seed}: {found.setup}\n  {dict(found.counts)}, log-probabilities at most {found.deviation:.2g} off"
        )
        counts += found.counts
        wrong += [f"seed {seed}, {found.setup}: {difference}" for difference in found.differences]
    print(f"{len(chosen)} configurations, {len(wrong)} wrong: {dict(counts)}")
    assert not wrong, f"CAKEKV_FUZZ_SEED=… runs one of them again{' with --long' if long else ''}:\n" + "\n".join(wrong)
    assert counts["ties"] <= counts["compared"] / 100
    if len(chosen) > 1:
        met = ["aborted", "preempted", "loaded tokens", "reread tokens", "spoiled", "reused tokens"]
        assert all(counts[kind] for kind in met), f"not everything was met: {counts}"
    if len(chosen) > 1 and long:
        missed = ["missed: corrupt", "missed: store failed", "missed: late", "missed: vanished from the store"]
        assert all(counts[kind] for kind in missed), f"not everything was met: {counts}"
        assert counts["requests"] >= 5000


def test_a_tie_is_no_difference_and_anything_else_is_one() -> None:
    right = [[(5, {5: -1.0, 7: -1.0005}), (9, {9: -0.5, 1: -2.0})]]
    assert compare(right, right) == ("", False, 0.0)
    assert compare(right, [[(7, {7: -1.0004, 5: -1.0006}), (3, {3: -0.1, 4: -3.0})]]) == ("", True, 0.0)
    assert compare(right, [[(5, {5: -1.0, 7: -1.0005}), (1, {1: -0.5, 9: -0.6})]]).what
    assert compare(right, [[(8, {8: -1.0, 5: -1.0}), (9, {9: -0.5, 1: -2.0})]]).what
    assert compare(right, [[(5, {5: -1.1, 7: -1.2}), (9, {9: -0.5, 1: -2.0})]]).what
    assert compare(right, [right[0][:1]]).what
    assert compare(right, right * 2).what
