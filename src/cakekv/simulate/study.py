"""How near the planner comes to the clairvoyant optimum, over random configurations."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from cakekv.restore.costs import ComputeCost, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Mode, Planner, PlannerOptions, Span
from cakekv.simulate.exact_optimum import best_seconds
from cakekv.simulate.hardware import HARDWARE, SHARES, ComputeCurve, estimated_curve
from cakekv.simulate.machine import VirtualTier, run_restore
from cakekv.simulate.optimum import least_seconds, runs_of
from cakekv.simulate.paper_tables import MODELS
from cakekv.simulate.rate import STEADY, Rate, pooled

HOLES = ("none", "few", "random", "runs")
DEPTH = 4
"""Loads in flight per tier."""
LATENCY_S = 0.5e-3
CHUNK_TOKENS = 64
MOST_CHUNKS = 128
"""Longer prompts have larger chunks."""
_MODES: tuple[Mode, ...] = ("auto", "compute", "load")
_PERIODS = 400
_CLOSE = 1.01
"""Within this of the continuous bound the exact optimum, which is slower to find, is not asked for."""


@dataclass(frozen=True)
class Configuration:
    """One restore of the study."""

    index: int
    model: str
    hardware: str
    share: float
    prompt_tokens: int
    suffix_tokens: int
    chunk_tokens: int
    holes: str
    stored: tuple[bool, ...]
    tiers: tuple[Rate, ...]
    effort: Rate
    fluctuates: bool
    warm: bool

    @property
    def curve(self) -> ComputeCurve:
        """What prefill takes, in steps of whole chunks."""
        curve = estimated_curve(self.hardware, self.share, MODELS[self.model])
        return replace(curve, step_tokens=max(1, curve.step_tokens // self.chunk_tokens) * self.chunk_tokens)

    @property
    def token_bytes(self) -> float:
        """Bytes to load per token."""
        return MODELS[self.model].token_bytes()


@dataclass(frozen=True)
class Outcome:
    """What became of it, and of either arm alone on the same machine, in seconds."""

    configuration: Configuration
    time_s: float
    least_s: float
    compute_s: float
    load_s: float

    @property
    def ratio(self) -> float:
        """Time over the clairvoyant optimum."""
        return self.time_s / self.least_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the rates: the seed and the index bring them back."""
        configuration = self.configuration
        return {
            "index": configuration.index,
            "model": configuration.model,
            "hardware": configuration.hardware,
            "share": configuration.share,
            "prompt_tokens": configuration.prompt_tokens,
            "suffix_tokens": configuration.suffix_tokens,
            "chunk_tokens": configuration.chunk_tokens,
            "holes": configuration.holes,
            "gbps": [8e-9 * tier.mean for tier in configuration.tiers],
            "fluctuates": configuration.fluctuates,
            "warm": configuration.warm,
            "time_s": self.time_s,
            "optimum_s": self.least_s,
            "compute_s": self.compute_s,
            "load_s": self.load_s,
            "ratio": self.ratio,
            "against_better_arm": self.against_better_arm,
        }

    @property
    def against_better_arm(self) -> float:
        """Time over that of the better of computing everything and loading all that is stored."""
        return self.time_s / min(self.compute_s, self.load_s)


def draw(seed: int, index: int) -> Configuration:
    """The configuration of that number, the same wherever it is drawn."""
    rng = random.Random(f"{seed}:{index}")
    model, hardware, share = rng.choice(list(MODELS)), rng.choice(HARDWARE), rng.choice(SHARES)
    prompt = round(1024 * 128 ** rng.random())
    chunk = CHUNK_TOKENS
    while prompt > MOST_CHUNKS * chunk:
        chunk *= 2
    suffix = 1 if rng.random() < 0.4 else round((prompt / 2) ** rng.random())
    holes = rng.choice(HOLES)
    stored = _stored(rng, holes, (prompt - suffix) // chunk)
    fluctuates, warm = rng.random() < 0.4, rng.random() < 0.75
    gbps = [100 ** rng.random() for _ in range(rng.choice((1, 1, 1, 1, 2)))]
    tiers, effort = [Rate([rate * 1e9 / 8]) for rate in gbps], STEADY
    if fluctuates:
        curve = estimated_curve(hardware, share, MODELS[model])
        runs = runs_of(prompt, chunk, stored)
        period_s = least_seconds(curve, runs, MODELS[model].token_bytes(), pooled(tiers)) / 10 ** rng.uniform(0.3, 2)
        tiers = [Rate([rate * 1e9 / 8 * 2 * rng.random() for _ in range(_PERIODS)], period_s) for rate in gbps]
        effort = Rate([1 - 0.9 * rng.random() for _ in range(_PERIODS)], period_s)
    return Configuration(
        index,
        model,
        hardware,
        share,
        prompt,
        suffix,
        chunk,
        holes,
        stored,
        tuple(tiers),
        effort,
        fluctuates,
        warm,
    )


def _stored(rng: random.Random, holes: str, chunks: int) -> tuple[bool, ...]:
    stored = [True] * chunks
    if holes == "few":
        for _ in range(rng.randint(1, 3)):
            if chunks:
                stored[rng.randrange(chunks)] = False
    elif holes == "random":
        share = rng.uniform(0.05, 0.5)
        stored = [rng.random() >= share for _ in range(chunks)]
    elif holes == "runs":
        for _ in range(rng.randint(1, 4)):
            start, length = rng.randrange(chunks + 1), rng.randint(1, max(1, chunks // 4))
            stored[start : start + length] = [False] * len(stored[start : start + length])
    return tuple(stored)


def planner_of(configuration: Configuration, mode: Mode = "auto") -> Planner:
    """A fresh planner, with cost models that know this machine if the configuration is warm."""
    size = round(configuration.token_bytes * configuration.chunk_tokens)
    curve = configuration.curve
    tiers = []
    for index, bandwidth in enumerate(configuration.tiers):
        cost = LoadCost(DEPTH)
        if configuration.warm:
            _warm_up(cost, size, size / bandwidth.mean)
        tiers.append(Tier(f"tier{index}", cost, DEPTH))
    holders = tuple(range(len(tiers)))
    return Planner(
        configuration.prompt_tokens,
        configuration.chunk_tokens,
        [holders if held else () for held in configuration.stored],
        tiers,
        ComputeCost(curve.shape(curve.step_tokens), trusted=True) if configuration.warm else ComputeCost(),
        [Level.whole(size)],
        PlannerOptions(mode=mode, max_span_tokens=curve.step_tokens),
    )


def _warm_up(cost: LoadCost, size: int, each_s: float) -> None:
    """What a tier's model knows after one load alone, and many that kept it busy until a second before the restore."""
    cost.observe(size, -1e6, -1e6 + LATENCY_S + each_s, alone=True)
    for load in range(-100, 0):
        ended = -1 + load * each_s
        cost.observe(size, ended - LATENCY_S - DEPTH * each_s, ended)


def run(configuration: Configuration) -> Outcome:
    """Simulate it and compute what it is compared with."""
    curve, effort = configuration.curve, configuration.effort

    def compute_time(span: Span, now: float) -> float:
        return effort.ends(now, curve.seconds(span.start, span.tokens)) - now

    tiers = [VirtualTier(tier, LATENCY_S) for tier in configuration.tiers]
    time_s, compute_s, load_s = (run_restore(planner_of(configuration, mode), compute_time, tiers) for mode in _MODES)
    runs = runs_of(configuration.prompt_tokens, configuration.chunk_tokens, configuration.stored)
    bandwidth = pooled(configuration.tiers)
    least_s = least_seconds(curve, runs, configuration.token_bytes, bandwidth, effort)
    if time_s > _CLOSE * least_s:
        least_s = best_seconds(
            curve,
            configuration.prompt_tokens,
            configuration.chunk_tokens,
            configuration.stored,
            configuration.token_bytes,
            bandwidth,
            effort,
            between=(least_s, time_s),
        )
    return Outcome(configuration, time_s, least_s, compute_s, load_s)
