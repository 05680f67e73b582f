"""Choosing the next token from logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from cakekv.engine.base import check_sampling
from cakekv.engine.choice import Choice, Sampling
from cakekv.errors import BadInput


def choose_token(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    min_p: float | None = None,
) -> int:
    """Choose a token, greedily or by sampling.

    Parameters
    ----------
    logits : Tensor
        One per token of the vocabulary, shape (vocabulary,).
    temperature : float
        0 takes the most probable token; otherwise logits are divided by it and a token is sampled.
    top_k : int, optional
        Sample from this many of the most probable tokens only.
    top_p : float, optional
        Sample from the fewest most probable tokens that together have at least this probability.
    generator : torch.Generator, optional
        Source of randomness, on the logits' device; torch's own if not given.
    min_p : float, optional
        Sample from tokens only that are at least this many times as probable as the most probable one.

    Raises
    ------
    BadInput
        A setting is out of range, or the logits hold a NaN, or an infinity to sample by.
    """
    if logits.ndim != 1 or not logits.numel():
        raise BadInput(f"logits must have shape (vocabulary,), not {tuple(logits.shape)}")
    check_sampling(temperature, top_k, top_p)
    if bool(logits.isnan().any()):
        raise BadInput("the logits hold a NaN: the model's weights or its KV cache are damaged")
    if temperature == 0:
        return int(logits.argmax())

    logits = logits.float()
    best = logits.max()
    if not bool(best.isfinite()):
        raise BadInput("the logits hold an infinity: the model's weights or its KV cache are damaged")
    # So that none becomes infinite, however low the temperature; what softmax gives is the same.
    scaled = (logits - best) / max(temperature, torch.finfo(torch.float32).tiny)
    ranked, tokens = scaled.sort(descending=True, stable=True)
    ranked = ranked[: None if top_k is None else min(top_k, len(ranked))]
    probabilities = ranked.softmax(dim=0)
    if top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities[before < top_p]
    if min_p:
        probabilities = probabilities[probabilities >= min_p * probabilities[0]]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


class Chooser:
    """Chooses the tokens of one answer, one after the other.

    Parameters
    ----------
    sampling : Sampling
        How.
    prompt : sequence of int
        What is answered; a repetition penalty counts it, too.
    generator : torch.Generator
        Source of randomness.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], generator: torch.Generator) -> None:
        self._sampling = sampling
        self._prompt = torch.tensor(prompt, dtype=torch.long)
        self._generator = generator
        self._chosen: Counter[int] = Counter()

    def __call__(self, logits: torch.Tensor) -> Choice:
        """The next token; raises `BadInput` as `choose_token` does."""
        asked = self._sampling
        weighed = self._penalized(logits) if asked.penalizes else logits
        token = choose_token(weighed, asked.temperature, asked.top_k, asked.top_p, self._generator, asked.min_p)
        self._chosen[token] += 1
        if asked.logprobs is None:
            return Choice(token)
        logprobs = logits.float().log_softmax(dim=0)
        values, tokens = logprobs.topk(min(asked.logprobs, len(logprobs)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Choice(token, float(logprobs[token]), top)

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        asked, weighed = self._sampling, logits.float()
        if asked.repetition_penalty != 1:
            seen = torch.cat([self._prompt, torch.tensor(list(self._chosen), dtype=torch.long)]).to(weighed.device)
            weighed = RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)(seen[None], weighed[None])[0]
        if self._chosen and (asked.presence_penalty or asked.frequency_penalty):
            weighed = weighed.clone()
            for token, times in self._chosen.items():
                weighed[token] -= asked.presence_penalty + asked.frequency_penalty * times
        return weighed
