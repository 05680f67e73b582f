"""Is storing worth it? What one prompt takes computed, loaded and both, and from which bandwidth on loading pays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cakekv.errors import BadInput
from cakekv.quantities import parse_bandwidth
from cakekv.restore.costs import TYPICAL, ComputeCost, LoadCost
from cakekv.restore.flights import Tier
from cakekv.restore.level_choice import Level
from cakekv.restore.planner import Mode, Planner, PlannerOptions
from cakekv.simulate.hardware import HARDWARE, SHORT_STEP, STEP_TOKENS, ComputeCurve, estimated_curve
from cakekv.simulate.machine import VirtualTier, constant, run_restore, undisturbed
from cakekv.simulate.paper_tables import MODELS, ModelShape

KNOWN_MODELS = MODELS | {
    model.name: model
    for model in (
        ModelShape("Llama-3.2-1B", 16, 8, 32, 64, 1.24e9),
        ModelShape("Llama-3.2-3B", 28, 8, 24, 128, 3.21e9),
        ModelShape("Mistral-7B", 32, 8, 32, 128, 7.25e9),
        ModelShape("Qwen2.5-7B", 28, 4, 28, 128, 7.62e9),
        ModelShape("Qwen2.5-32B", 64, 8, 40, 128, 32.8e9),
        ModelShape("Qwen2.5-72B", 80, 8, 64, 128, 72.7e9),
        ModelShape("Qwen3-8B", 36, 8, 32, 128, 8.2e9),
        ModelShape("SmolLM2-135M", 30, 3, 9, 64, 0.135e9),
    )
}
_CHUNK_TOKENS = 64
_MOST_CHUNKS = 512
_DEPTH = 4


@dataclass(frozen=True)
class Verdict:
    """What storing would do for one prompt. Times in seconds, to the first token."""

    model: str
    prompt_tokens: int
    stored_tokens: int
    stored_bytes: int
    bandwidth: float
    """Bytes per second."""
    compute_s: float
    load_s: float
    both_s: float
    met_at: int | None
    """Position where the arms would meet; None if nothing is loaded."""
    break_even: float
    """Bytes per second from which on loading all that is stored is at least as fast as computing everything."""

    @property
    def worth_it(self) -> bool:
        """Whether a stored prefix saves at least a tenth of the time."""
        return self.both_s <= 0.9 * self.compute_s


def sweep(verdict: Verdict, model: ModelShape, compute: str) -> list[Verdict]:
    """The same prompt at bandwidths from a sixteenth to sixteen times the one where loading breaks even."""
    suffix = verdict.prompt_tokens - verdict.stored_tokens
    around = verdict.break_even if math.isfinite(verdict.break_even) else verdict.bandwidth
    rates = [around * 2 ** (step / 2) for step in range(-8, 9)]
    return [what_if(model, verdict.prompt_tokens, f"{rate:.0f}B/s", compute, suffix) for rate in rates]


def model_named(text: str) -> ModelShape:
    """A model by name or by its shape, "layers,kv_heads,head_dim".

    Raises
    ------
    BadInput
        It is neither.
    """
    for name, model in KNOWN_MODELS.items():
        if name.lower() == text.lower():
            return model
    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        layers, kv_heads, head_dim = map(int, parts)
        return ModelShape(text, layers, kv_heads, 0, head_dim, 0.0)
    raise BadInput(
        f"unknown model {text!r}: write layers,kv_heads,head_dim, such as 32,8,128, or one of {', '.join(KNOWN_MODELS)}"
    )


def curve_of(compute: str, model: ModelShape, tokens: int) -> ComputeCurve:
    """A compute curve from a machine's name or from tokens per second, averaged over a prefill of `tokens` tokens.

    Raises
    ------
    BadInput
        It is neither, or a machine was named for a model of which only the KV cache's shape is known.
    """
    for name in HARDWARE:
        if name.lower() == compute.lower():
            if not model.parameters:
                raise BadInput(
                    f"how fast {name} computes {model.name} depends on more than the shape of its KV cache: "
                    f"give --compute in tokens per second, or a model by name ({', '.join(KNOWN_MODELS)})"
                )
            return estimated_curve(name, 1.0, model)
    try:
        speed = float(compute)
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise BadInput(
            f"{compute!r} is not a speed: write tokens per second, such as 9000, or one of {', '.join(HARDWARE)}"
        )
    if model.parameters:
        typical = estimated_curve("A100", 1.0, model)
        curvature = typical.quadratic / typical.linear
    else:
        curvature = TYPICAL.quadratic / TYPICAL.linear
    linear = 1 / (speed * (1 + curvature * tokens / 2))
    return ComputeCurve(linear, linear * curvature, STEP_TOKENS, SHORT_STEP)


def what_if(model: ModelShape, tokens: int, bandwidth: str, compute: str, suffix: int = 1) -> Verdict:
    """Simulate the planner on a prompt whose prefix is stored.

    Parameters
    ----------
    model : ModelShape
        The model.
    tokens : int
        Tokens of the whole prompt.
    bandwidth : str
        Of the storage, such as "7Gbps" or "1.5GB/s".
    compute : str
        Tokens per second, or a machine of the paper ("A100", "2xA100", "H100").
    suffix : int
        Tokens at the end that are not stored; at least 1.

    Raises
    ------
    BadInput
        One of them makes no sense.
    """
    rate = parse_bandwidth(bandwidth)
    if rate is None:
        raise BadInput('the bandwidth cannot be "unlimited" here; give one such as "7Gbps"')
    if not 1 <= suffix <= tokens:
        raise BadInput(f"the suffix has 1 to {tokens} tokens (the whole prompt), not {suffix}")
    curve = curve_of(compute, model, tokens)
    chunk = _CHUNK_TOKENS
    while tokens > chunk * _MOST_CHUNKS:
        chunk *= 2
    size = round(model.token_bytes() * chunk)
    stored = [(0,)] * ((tokens - suffix) // chunk)

    def simulate(mode: Mode, rate: float) -> tuple[float, int | None]:
        span_tokens = max(chunk, STEP_TOKENS)
        known = LoadCost()
        known.observe(size, -size / rate, 0.0)
        planner = Planner(
            tokens,
            chunk,
            stored,
            [Tier("storage", known, _DEPTH)],
            ComputeCost(curve.shape(span_tokens), trusted=True),
            [Level.whole(size)],
            PlannerOptions(mode=mode, max_span_tokens=span_tokens),
        )
        seconds = run_restore(planner, undisturbed(curve.seconds), [VirtualTier(constant(rate))])
        return seconds, planner.report().met_at

    compute_s, _ = simulate("compute", rate)
    load_s, _ = simulate("load", rate)
    both_s, met_at = simulate("auto", rate)
    stored_tokens = len(stored) * chunk
    # Loading is over when its bytes are and then the rest is computed: linear in 1 / bandwidth, so no search is needed.
    rest_s = curve.seconds(stored_tokens, tokens - stored_tokens)
    break_even = len(stored) * size / (compute_s - rest_s) if stored else math.inf
    return Verdict(
        model.name, tokens, stored_tokens, len(stored) * size, rate, compute_s, load_s, both_s, met_at, break_even
    )
