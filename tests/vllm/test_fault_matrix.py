"""Hundreds of requests against a store that fails in every way, by a seed: nothing wrong, nothing leaked, no end."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import BLOCK, TinyEngine, closing, prompt
from vllm import SamplingParams

from cakekv.vllm.metrics import kind_of

PREFIXES, REQUESTS, AT_ONCE = 6, 60, 6
FAULTS = {
    "errors": "error:0.2",
    "short reads": "read.short:0.3",
    "corrupt bytes": "corrupt:0.3",
    "hangs": "read.hang:0.05,open.hang:0.05,lookup.hang:0.02,hang_s:2s",
    "slowness": "slow:0.3,slow_s:20ms",
    "vanishing": "vanish:0.3",
    "everything": "error:0.05,short:0.05,corrupt:0.1,hang:0.01,slow:0.1,vanish:0.05,hang_s:1s,slow_s:10ms",
}


def requests(seed: int) -> list[list[int]]:
    """Prompts that begin with one of a few prefixes, whole or in part."""
    rng = random.Random(seed)
    chosen = []
    for _ in range(REQUESTS):
        prefix = prompt(5 * BLOCK, seed=100 * rng.randrange(PREFIXES))[: rng.choice([2, 3, 5]) * BLOCK]
        chosen.append(prefix + prompt(rng.randint(1, 60), seed=rng.randrange(10**6)))
    return chosen


def answers(engine: TinyEngine, prompts: list[list[int]]) -> list[list[int]]:
    """A few requests at a time; blocks that are still known from earlier are forgotten between them."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    found: list[list[int]] = []
    for start in range(0, len(prompts), AT_ONCE):
        found += engine.finish(*(engine.add(one, params) for one in prompts[start : start + AT_ONCE]))
        engine.settle()
        assert engine.llm.reset_prefix_cache()
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[Any, Any]:
    """What plain vLLM answers."""
    with closing(TinyEngine(model)) as plain:
        return {seed: answers(plain, requests(seed)) for seed in range(len(FAULTS))}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_store_changes_nothing(model: Path, expected: Any, tmp_path: Path, fault: Any) -> None:
    seed = list(FAULTS).index(fault)
    store = f"{tmp_path}/store?faults=seed:{seed},{FAULTS[fault]}"
    options = {"store": store, "mode": "both", "load_deadline": 0.5}
    with closing(TinyEngine(model, options)) as engine:
        assert answers(engine, requests(seed)) == expected[seed]
        engine.assert_nothing_leaked()
        reports = [report for _, report in engine.half.outcomes.latest]
    assert sum(report.loaded_tokens for report in reports) > 0, "nothing was loaded: no test of faults"
    reasons = Counter(kind_of(miss.reason) for report in reports for miss in report.misses)
    if fault != "slowness":
        assert reasons.total() - reasons["not stored"] > 0, f"no fault was met: {reasons}"
