"""An engine in NumPy: a transformer with random weights, two layers, 97 tokens. What another engine needs, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cakekv.codec.base import Segment
from cakekv.engine.base import Engine, Gate, check_sampling
from cakekv.errors import BadInput
from cakekv.keys import Identity, canonical, fingerprint_tensors
from cakekv.layout import KVLayout, LayerLayout, PlaneLayout

LAYERS, WIDTH, VOCABULARY, CONTEXT = 2, 8, 97, 512

Array = npt.NDArray[np.float32]
"""The cache is one of shape (layers, keys and values, tokens, width); logits have shape (vocabulary,)."""


class ToyEngine(Engine[Array, Array]):
    """One attention head per layer, sinusoidal positions, no normalisation.

    Parameters
    ----------
    seed : int
        Of the weights.
    """

    layout = KVLayout((LayerLayout((PlaneLayout(1, WIDTH, 4), PlaneLayout(1, WIDTH, 4))),) * LAYERS)
    max_context = CONTEXT
    vocabulary_size = VOCABULARY
    device_name = "numpy"
    stop_tokens = frozenset[int]()

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        self.weights = rng.normal(0.0, 0.5, (LAYERS, 4, WIDTH, WIDTH)).astype(np.float32)
        angles = np.arange(CONTEXT)[:, None] / 1000.0 ** (np.arange(WIDTH) / WIDTH)
        self.positions = np.sin(angles).astype(np.float32)
        tensors = {"embedding": self.embedding, "weights": self.weights}
        self._fingerprint = fingerprint_tensors(
            (name, "float32", tensor.shape, tensor.data) for name, tensor in tensors.items()
        )

    def identity(self, chunk_tokens: int, tenant: str = "", recipe: str = "raw") -> Identity:
        return Identity(
            weights=self._fingerprint,
            architecture=canonical({"toy": 1}),
            dtype="float32",
            layout=canonical({"planes": "heads, tokens, width"}),
            chunk_tokens=chunk_tokens,
            tenant=tenant,
            recipe=recipe,
        )

    def new_cache(self, capacity: int) -> Array:
        if not 1 <= capacity <= CONTEXT:
            raise BadInput(f"a cache can have 1 to {CONTEXT} tokens (the model's context), not {capacity}")
        return np.zeros((LAYERS, 2, capacity, WIDTH), np.float32)

    def compute(self, cache: Array, token_ids: Sequence[int], start: int, gate: Gate | None = None) -> Array:
        end = start + len(token_ids)
        hidden = self.embedding[list(token_ids)] + self.positions[start:end]
        unseen = np.arange(end) > np.arange(start, end)[:, None]
        for layer, (query, key, value, out) in enumerate(self.weights):
            cache[layer, :, start:end] = hidden @ key, hidden @ value
            if gate is not None:
                gate(layer)  # from here on, this layer may read what is before the span
            keys, values = cache[layer, :, :end]
            scores = np.where(unseen, -np.inf, hidden @ query @ keys.T)
            attention = np.exp(scores - scores.max(axis=1, keepdims=True))
            attention /= attention.sum(axis=1, keepdims=True)
            hidden = hidden + np.tanh(attention @ values @ out)
        logits: Array = hidden[-1] @ self.embedding.T
        return logits

    def place(self, cache: Array, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        copied = 0
        for layer, segment in enumerate(segments):
            if segment is not None:
                assert isinstance(segment, memoryview), "tensors come from an engine's own decoder, and this has none"
                planes = np.frombuffer(segment, np.float32)
                cache[layer, :, start : start + tokens] = planes.reshape(2, tokens, WIDTH)
                copied += planes.nbytes
        return copied

    def gather(self, cache: Array, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        for layer, segment in enumerate(segments):
            planes = np.frombuffer(segment, np.float32).reshape(2, tokens, WIDTH)
            planes[:] = cache[layer, :, start : start + tokens]

    def staging(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def held_bytes(self, cache: Array) -> int:
        return cache.nbytes

    def sampler(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Callable[[Array], int]:
        check_sampling(temperature, top_k, top_p)
        rng = np.random.default_rng(seed)

        def choose(logits: Array) -> int:
            ranked = np.argsort(-logits, kind="stable")[: None if temperature else 1][:top_k]
            weights = np.exp((logits[ranked] - logits[ranked[0]]).astype(float) / (temperature or 1.0))
            weights = np.where(np.cumsum(weights) - weights < (top_p or 1.0) * weights.sum(), weights, 0.0)
            return int(rng.choice(ranked, p=weights / weights.sum()))

        return choose
