"""The contract of an embedded engine: a KV cache that may be filled from both ends, and spans of prefill over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from cakekv.codec.base import Segment
from cakekv.engine.choice import Choice, Sampling
from cakekv.errors import BadInput, PromptTooLong, UnknownRotation, UnsupportedEngine
from cakekv.keys import RAW, Identity
from cakekv.layout import KVLayout
from cakekv.rotation import Rotation

if TYPE_CHECKING:
    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder
    from cakekv.compress.base import Marked, Method
    from cakekv.decode.base import Sight
    from cakekv.decode.groups import Groups
    from cakekv.reuse.blend import Blend

Cache = TypeVar("Cache")
Logits = TypeVar("Logits")
Result = TypeVar("Result")


Gate = Callable[[int], None]
"""(index into the layout's layers) returns as soon as that layer may attend to the positions before the span."""
Gather = Callable[[Sequence[memoryview]], None]
"""Copies a chunk out of a cache into its per-layer segments."""


class Move(NamedTuple):
    """How a chunk is placed elsewhere than where it was computed."""

    tokens: int
    """Tokens of the chunk."""
    skip: int
    """Tokens at its beginning that are left out."""
    by: int
    """Positions that it moves by."""
    rotations: Sequence[Rotation] | None
    """How the keys of each of the layout's layers are turned; None: they stay as they are."""


class EngineState(NamedTuple):
    """What an engine computes with at one moment. Two states are equal if nothing changed between them."""

    revision: int = 0
    """Another number whenever something that `compute` depends on has changed, or was written to."""
    unnamed: str = ""
    """Why `identity` does not name all that computes, in words: nothing is loaded or saved then. "" if it does."""


class Engine(ABC, Generic[Cache, Logits]):
    """What a restore needs of a model."""

    layout: KVLayout
    max_context: int
    """Tokens the model's positions reach."""
    vocabulary_size: int

    @property
    @abstractmethod
    def device_name(self) -> str:
        """What computes, and with how many threads: what compute costs depend on besides the model."""

    @property
    @abstractmethod
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def rotations(self) -> Sequence[Rotation]:
        """How the keys of each of the layout's layers are turned by their positions.

        Raises
        ------
        UnknownRotation
            That cannot be told, or changes with the prompt.
        """
        raise UnknownRotation("this engine does not tell")

    def turnable(self) -> Sequence[Rotation]:
        """As `rotations`, if keys that are turned to other positions are those that the model computes there.

        Raises
        ------
        UnknownRotation
            They are not, or it cannot be told.
        """
        raise UnknownRotation("this engine does not tell")

    @abstractmethod
    def identity(self, chunk_tokens: int, tenant: str = "", recipe: str = RAW) -> Identity:
        """Everything that decides whether a stored chunk is this model's, as the model is now."""

    def weights_names(self) -> Iterator[str]:
        """Fingerprints under which something learned of the model may be kept, the most particular first."""
        yield self.identity(1).weights

    def state(self) -> EngineState:
        """What computes now, in the calling thread; asked for before and after every span, so it has to be cheap.

        The default is for an engine whose model never changes: its identity is asked for once.
        """
        return EngineState()

    @abstractmethod
    def new_cache(self, capacity: int) -> Cache:
        """An empty KV cache with room for `capacity` tokens."""

    def new_sparse_cache(self, capacity: int) -> Cache:
        """As `new_cache`, for chunks of which rows may be absent, as `Codec.drops` says: nothing attends to those.

        Raises
        ------
        UnsupportedEngine
            The engine attends to all that is loaded.
        """
        raise UnsupportedEngine("this engine attends to all that is loaded: give no compress that acts at store")

    def kept_share(self, cache: Cache, length: int) -> float:
        """Of the rows of all layers and heads of a cache's first `length` tokens, the part that is there."""
        return 1.0

    def present(self, cache: Cache, length: int) -> Any:
        """What is there of a cache's first `length` tokens, without room for absent rows; the same if all is there.

        `compute` goes on with it, at the end of the text.
        """
        return cache

    @abstractmethod
    def compute(self, cache: Cache, token_ids: Sequence[int], start: int, gate: Gate | None = None) -> Logits:
        """Run the model over the span of `token_ids` that begins at position `start`.

        Every position below `start` that a layer can see must be covered. Fills the cache at the span's positions.
        With a `gate`, what layer l can see must be covered only once `gate(l)` has returned; what the gate raises ends
        the computation.

        Returns
        -------
        Logits
            Of the span's last token, shape (vocabulary,).
        """

    def blendable(self, way: Blend) -> None:
        """Refuse a model that `blend` does not do right.

        Raises
        ------
        UnsupportedEngine, UnsupportedModel
            With the reason.
        """
        raise UnsupportedEngine("this engine does not drive a model's layers one by one")

    def blend(
        self,
        cache: Cache,
        token_ids: Sequence[int],
        start: int,
        always_from: int,
        way: Blend,
        gate: Gate | None = None,
    ) -> tuple[Logits, Sequence[int]]:
        """As `compute`, of positions up to `always_from` of which something is in the cache, and what follows them.

        All layers up to `way.check` are computed at all positions, those above at the chosen ones: the share
        `way.recompute` of the positions before `always_from`, and all from there on. Each sees what is before it, of
        which nothing may be missing. If it fails while there is a `gate`, the cache is as it was.

        Returns
        -------
        Logits
            Of the last token, shape (vocabulary,).
        sequence of int
            The positions that were computed in all layers, ascending.
        """
        raise UnsupportedEngine("this engine does not drive a model's layers one by one")

    def compressible(self, methods: Sequence[Method | Sight]) -> None:
        """Refuse a model of which these methods cannot keep, or see, fewer tokens.

        Raises
        ------
        UnsupportedEngine, UnsupportedModel, UnknownRotation
            With the reason.
        """
        if methods:
            raise UnsupportedEngine(
                "this engine keeps and sees all tokens of a prompt: give no compress, and no decode"
            )

    def compress(self, cache: Cache, token_ids: Sequence[int], method: Method, marked: Sequence[Marked] = ()) -> Any:
        """What a method leaves of a prompt's complete cache, which stays as it was; the same cache if that is all.

        `compute` goes on with it, one token or several, at the end of the text.
        """
        raise UnsupportedEngine("this engine keeps all tokens of a prompt: give no compress")

    def look(
        self,
        cache: Cache,
        token_ids: Sequence[int],
        sight: Sight,
        marked: Sequence[Marked] = (),
        spans: Mapping[int, Mapping[int, Groups]] = MappingProxyType({}),
    ) -> Any:
        """A copy of a prompt's complete cache of which `compute`, at the end of the text, sees what a sight says.

        `spans`: what the sight has worked out before, by layer, as in `Sight.beside`.
        """
        raise UnsupportedEngine("this engine sees all tokens of a prompt: give no decode")

    def begin_recall(self, cache: Cache, length: int, sight: Sight, spans: Mapping[int, Mapping[int, Groups]]) -> Any:
        """As `look`, in the cache's own memory, of which what is before `length` may still be missing.

        `spans` has all of that. What the sight needs of the missing rows it asks for as `cakekv.decode.groups.Recall`
        says. The view has the cache's capacity.
        """
        raise UnsupportedEngine("this engine sees all tokens of a prompt: give no decode")

    def draft(self, cache: Any, token: int, position: int) -> int:
        """The likeliest token behind `token`, as the cheaper view of a cache has it that `look` has returned.

        The cache goes on behind `token`, until it is told to `verify` or to `settle`.
        """
        raise UnsupportedEngine("this engine drafts nothing: give no decode")

    def verify(self, cache: Any, token_ids: Sequence[int], start: int) -> Sequence[Logits]:
        """The logits of all these tokens, in place of whatever was drafted behind `start`.

        None of them is rounded, or whatever else the cache does with tokens that stay, before it is told to `settle`.
        """
        raise UnsupportedEngine("this engine drafts nothing: give no decode")

    @abstractmethod
    def place(self, cache: Cache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        """Copy a chunk's segments into the cache; called from loader threads while `compute` runs elsewhere.

        Parameters
        ----------
        cache : Cache
            The cache being restored.
        start, tokens : int
            The chunk's first position and its length.
        segments : sequence of Segment or None
            Per layer, laid out as `KVLayout.segment_bytes` says; None for a layer that does not need it. Tensors come
            from the engine's own `decoder`.

        Returns
        -------
        int
            Bytes copied.
        """

    def place_moved(self, cache: Cache, start: int, tokens: int, segments: Sequence[Segment | None], move: Move) -> int:
        """As `place`, of a chunk that was computed elsewhere; `start` and `tokens` are of what is not skipped.

        Raises
        ------
        UnsupportedEngine
            The engine cannot do that.
        """
        raise UnsupportedEngine("this engine places chunks only where they were computed: give no reuse")

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        """What decodes chunks where the caches are; None: the CPU does."""
        return None

    @abstractmethod
    def gather(self, cache: Cache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        """Copy a covered region of the cache into per-layer segments (the reverse of `place`)."""

    def gatherer(self, cache: Cache, start: int, tokens: int) -> Gather:
        """As `gather`, for later: what it returns raises `CacheRewritten` if the region was written to in between.

        The default is for an engine whose caches nobody else can write to.
        """
        return partial(self.gather, cache, start, tokens)

    @abstractmethod
    def staging(self, size: int) -> memoryview:
        """A page-aligned buffer of `size` bytes to read chunks into (pinned where the device wants it)."""

    def check_prompt(self, token_ids: Sequence[int], *, must_fit: bool = True) -> None:
        """Refuse a prompt that the model cannot take.

        Parameters
        ----------
        token_ids : sequence of int
            The prompt.
        must_fit : bool
            Whether it may not be longer than the context.

        Raises
        ------
        BadInput
            It is empty, longer than the context, or holds something else than token ids of the vocabulary.
        """
        tokens = np.asarray(token_ids)
        if not tokens.size:
            raise BadInput("the prompt is empty: it must have at least one token")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise BadInput(f"token ids must be a flat sequence of integers, not {tokens.ndim}-d {tokens.dtype}")
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.vocabulary_size))
        if wrong.size:
            raise BadInput(
                f"token id {tokens[wrong[0]]} at position {wrong[0]} is out of range: "
                f"the model's vocabulary goes from 0 to {self.vocabulary_size - 1}"
            )
        if must_fit and tokens.size > self.max_context:
            raise PromptTooLong(
                f"the prompt has {tokens.size} tokens, but the model's context is {self.max_context} tokens: shorten it"
            )

    def held_bytes(self, cache: Cache) -> int | None:
        """Memory that is free again once the cache is let go of; None if that cannot be told."""
        return None

    def carry(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """The same work, to be done in another thread as it would be in this one.

        Some libraries keep settings per thread; those that the model's computing depends on go with the work.
        """
        return work

    @abstractmethod
    def sampler(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Callable[[Logits], int]:
        """How to choose a token from logits: the likeliest one at temperature 0.0, else a seeded sample.

        Raises
        ------
        BadInput
            A parameter is out of range.
        """

    def chooser(self, sampling: Sampling, prompt: Sequence[int]) -> Callable[[Logits], Choice]:
        """How to choose the tokens of one answer, one after the other.

        Raises
        ------
        BadInput
            The engine does not know one of the settings.
        """
        if not sampling.is_plain:
            raise BadInput("this engine has no penalties, no min_p and no logprobs")
        choose = self.sampler(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
        return lambda logits: Choice(choose(logits))

    @property
    def proposed_sampling(self) -> dict[str, Any]:
        """What the model's makers propose to sample by, as keyword arguments of `Cake.stream`; empty for greedily."""
        return {}


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse what no engine can sample by.

    Raises
    ------
    BadInput
        A parameter of `Engine.sampler` is out of range.
    """
    Sampling(temperature, top_k, top_p)
