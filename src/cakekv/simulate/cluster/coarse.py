"""How long one prompt takes, in closed form: instead of the planner's chunk by chunk decisions, where they lead.

A prompt is its prefix and its suffix. RAM holds the head of the prefix, the remote tier the rest of it (both evict from
the tail, and RAM is the smaller), of which some was loaded before compute got to the prompt:

    0 ........ ram_left --- ram_tokens ........ ram_tokens + remote_left --- prefix_tokens ........ prompt_tokens
      to cover          done           to cover                          done              suffix: compute
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cakekv.restore.costs import ComputeShape


@dataclass(frozen=True)
class Machine:
    """One node: what compute costs and how fast its tiers are, in tokens per second."""

    shape: ComputeShape
    ram_rate: float
    layers: int
    span_tokens: int = 512
    chunk_tokens: int = 128

    def compute_s(self, start: int, tokens: float) -> float:
        """Seconds to compute `tokens` tokens from `start` on, in spans."""
        if tokens <= 0:
            return 0.0
        shape = self.shape
        spans = math.ceil(tokens / self.span_tokens)
        return shape.fixed * spans + tokens * (shape.linear + shape.quadratic * (start + 0.5 * tokens))

    def meeting(self, start: int, tokens: float, rate: float, head_start_s: float = 0.0) -> float:
        """Tokens that compute, going forward from `start`, covers before it meets the loads coming back from behind.

        Parameters
        ----------
        start : int
            Position where compute begins.
        tokens : float
            Tokens between compute and the end of the region.
        rate : float
            Tokens per second of the loads.
        head_start_s : float
            Seconds that compute begins before the loads do; negative if it begins after.
        """
        # compute_s(start, met) = head_start_s + (tokens - met) / rate, a span's fixed cost spread over the span
        shape = self.shape
        slope = shape.linear + shape.fixed / self.span_tokens + shape.quadratic * start + 1.0 / rate
        constant = tokens / rate + head_start_s
        if constant <= 0:
            return 0.0
        root = math.sqrt(slope * slope + 2.0 * shape.quadratic * constant)
        return min(tokens, 2.0 * constant / (slope + root))


class Task(NamedTuple):
    """What is left to do for a prompt when compute gets to it, in tokens."""

    prompt_tokens: int
    prefix_tokens: int
    ram_tokens: int
    """The part of the prefix that RAM holds."""
    ram_left: float
    remote_left: float


class Outcome(NamedTuple):
    """What came of it."""

    seconds: float
    """Until the first token."""
    computed_tokens: float
    ram_s: float
    """Seconds for which the RAM tier was kept busy."""
    remote_s: float


System = Callable[[Machine, Task, float], Outcome]
"""(machine, task, tokens per second of the remote tier) to what came of it."""


def compute_only(machine: Machine, task: Task, remote_rate: float) -> Outcome:
    """Nothing is stored."""
    return Outcome(machine.compute_s(0, task.prompt_tokens), task.prompt_tokens, 0.0, 0.0)


def load_only(machine: Machine, task: Task, remote_rate: float) -> Outcome:
    """The prefix is loaded, both tiers at once; then the suffix is computed."""
    ram_s, remote_s = task.ram_left / machine.ram_rate, task.remote_left / remote_rate
    suffix = task.prompt_tokens - task.prefix_tokens
    seconds = max(ram_s, remote_s) + machine.compute_s(task.prefix_tokens, suffix)
    return Outcome(seconds, suffix, ram_s, remote_s)


def layerwise(machine: Machine, task: Task, remote_rate: float) -> Outcome:
    """The suffix is computed layer by layer while the prefix of the layers above is still being loaded."""
    ram_s, remote_s = task.ram_left / machine.ram_rate, task.remote_left / remote_rate
    suffix = task.prompt_tokens - task.prefix_tokens
    load_s, suffix_s = max(ram_s, remote_s), machine.compute_s(task.prefix_tokens, suffix)
    seconds = max(load_s, suffix_s) + min(load_s, suffix_s) / machine.layers
    return Outcome(seconds, suffix, ram_s, remote_s)


def cake(machine: Machine, task: Task, remote_rate: float) -> Outcome:
    """The paper's Cake: tiers one after the other from the back, whole spans from the front, both always at work."""
    suffix = task.prompt_tokens - task.prefix_tokens
    suffix_s = machine.compute_s(task.prefix_tokens, suffix)
    remote_s = task.remote_left / remote_rate
    if task.remote_left and machine.compute_s(0, task.ram_left) < remote_s:
        # Compute walks through the whole head before the remote tier is through with the tail.
        head_s = machine.compute_s(0, task.ram_left)
        left = task.remote_left - head_s * remote_rate
        met = _whole_spans(machine, machine.meeting(task.ram_tokens, left, remote_rate), task.remote_left)
        seconds = head_s + machine.compute_s(task.ram_tokens, met)
        return Outcome(seconds + suffix_s, task.ram_left + met + suffix, 0.0, min(seconds, remote_s))
    met = machine.meeting(0, task.ram_left, machine.ram_rate, remote_s * (1.0 if task.ram_left else 0.0))
    met = _whole_spans(machine, met, task.ram_left)
    seconds = machine.compute_s(0, met) if task.ram_left else remote_s
    ram_s = max(0.0, (task.ram_left - met) / machine.ram_rate)
    return Outcome(seconds + suffix_s, met + suffix, ram_s, remote_s)


def _whole_spans(machine: Machine, tokens: float, most: float) -> float:
    return min(most, max(1, math.ceil(tokens / machine.span_tokens)) * machine.span_tokens)


def ours(machine: Machine, task: Task, remote_rate: float) -> Outcome:
    """The planner of `cakekv.restore`: all tiers at once, and the arms land together or the slower one rests."""
    suffix = task.prompt_tokens - task.prefix_tokens
    head, head_s = _landing(machine, 0, task.ram_left, machine.ram_rate)
    left = max(0.0, task.remote_left - head_s * remote_rate)
    tail, tail_s = _landing(machine, task.ram_tokens, left, remote_rate)
    seconds = head_s + tail_s + machine.compute_s(task.prefix_tokens, suffix)
    ram_s = (task.ram_left - head) / machine.ram_rate
    remote_s = (task.remote_left - tail) / remote_rate
    return Outcome(seconds, head + tail + suffix, ram_s, remote_s)


def ours_layered(machine: Machine, task: Task, remote_rate: float) -> Outcome:
    """As `ours` with a layered finish, where it pays: the end of the prefix arrives under the suffix's compute."""
    suffix = task.prompt_tokens - task.prefix_tokens
    suffix_s = machine.compute_s(task.prefix_tokens, suffix)
    if task.remote_left:
        head, head_s = _landing(machine, 0, task.ram_left, machine.ram_rate)
        start, rate, left = task.ram_tokens, remote_rate, max(0.0, task.remote_left - head_s * remote_rate)
    else:
        head, head_s = 0.0, 0.0
        start, rate, left = 0, machine.ram_rate, task.ram_left
    outcomes = [ours(machine, task, remote_rate), layerwise(machine, task, remote_rate)]
    # Compute stops where the suffix's last layer, or if that is later its first, comes just when its loads have.
    hidden_s = suffix_s * (1.0 - 1.0 / machine.layers)
    met_last = machine.meeting(start, left, rate, -hidden_s)
    met_first = machine.meeting(start, left, rate * machine.layers)
    for met in _chunks_around(machine, max(met_first, met_last), left):
        front_s, load_s = machine.compute_s(start, met), (left - met) / rate
        first_s, last_s = load_s / machine.layers + suffix_s, load_s + suffix_s / machine.layers
        seconds = head_s + max(front_s + suffix_s, first_s, last_s)
        ram_met, remote_met = (head, met) if task.remote_left else (met, 0.0)
        ram_s, remote_s = (task.ram_left - ram_met) / machine.ram_rate, (task.remote_left - remote_met) / remote_rate
        outcomes.append(Outcome(seconds, head + met + suffix, ram_s, remote_s))
    return min(outcomes)


def _landing(machine: Machine, start: int, tokens: float, rate: float) -> tuple[float, float]:
    """Tokens to compute of a region, in chunks, so that it is covered soonest; and the seconds until it is."""
    if tokens <= 0:
        return 0.0, 0.0
    choices = _chunks_around(machine, machine.meeting(start, tokens, rate), tokens)
    seconds, computed = min(
        (max(machine.compute_s(start, choice), (tokens - choice) / rate), choice) for choice in choices
    )
    return computed, seconds


def _chunks_around(machine: Machine, met: float, most: float) -> set[float]:
    """Meeting points to choose from: the chunk's borders around the ideal one, or no compute at all."""
    below = met // machine.chunk_tokens * machine.chunk_tokens
    return {0.0, below, min(most, below + machine.chunk_tokens)}
