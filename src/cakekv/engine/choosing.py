"""Has a method choose what of a complete prompt's cache survives: shows it the last queries, by running them again.

The rows of attention that a method wants to see are those of the prompt's last tokens. However the cache came about,
loaded or computed, these tokens run through the model once more, over the complete cache and without writing to it; so
a method's choice does not depend on what was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from cakekv.compress.base import ALL, Layer, Marked, Method
from cakekv.engine.absent import attend_present, positions_of
from cakekv.engine.cache import TwoEndedCache, TwoEndedLayer, numbers_of
from cakekv.engine.ragged import RaggedCache, RaggedLayer, filling_view, ragged_view
from cakekv.engine.tap import Attending, Tap
from cakekv.engine.versions import Cache
from cakekv.errors import BadInput, UnsupportedModel

if TYPE_CHECKING:
    from cakekv.decode.base import Sight
    from cakekv.decode.groups import Groups

_SPAN = 256
"""Tokens that run again at once."""
_TOKENS, _START = 12, 8
_TOLERANCE, _ROUNDINGS = 1e-4, 16


def choose(
    engine: Any, cache: TwoEndedCache, token_ids: Sequence[int], method: Method, marked: Sequence[Marked] = ()
) -> RaggedCache | TwoEndedCache:
    """A method's choice of a complete prompt's cache.

    Parameters
    ----------
    engine : TransformersEngine
        Whose cache it is.
    cache : TwoEndedCache
        Covers the prompt. It is not written to.
    token_ids : sequence of int
        The prompt.
    method : Method
        Chooses.
    marked : sequence of Marked
        Positions of the prompt that are marked.

    Returns
    -------
    RaggedCache or TwoEndedCache
        What is left; the same cache if that is everything, and will be.

    Raises
    ------
    UnsupportedModel
        The model's attention cannot be tapped, or its keys cannot be turned to other positions.
    """
    rotations = engine.turnable() if method.compact else None
    tap = engine.tap
    ragged = ragged_view(cache, len(token_ids), method, rotations)
    layers = _seen(engine, tap, cache, ragged, token_ids, method.rows, marked)
    ragged.choose(method, layers)
    if not method.compact:
        ragged.capacity = engine.max_context
    return ragged if ragged.has_dropped or "decode" in method.at or method.compact else cache


def look(
    engine: Any,
    cache: TwoEndedCache | RaggedCache,
    token_ids: Sequence[int],
    sight: Sight,
    marked: Sequence[Marked] = (),
    spans: Mapping[int, Mapping[int, Groups]] = MappingProxyType({}),
) -> RaggedCache:
    """A prompt's complete cache as a sight has it, in a copy.

    Parameters
    ----------
    engine : TransformersEngine
        Whose cache it is.
    cache : TwoEndedCache
        Covers the prompt. It is not written to.
    token_ids : sequence of int
        The prompt.
    sight : Sight
        Says what is attended to.
    marked : sequence of Marked
        Positions of the prompt that are marked.
    spans : mapping
        As for `Engine.look`.
    """
    if isinstance(cache, RaggedCache):
        raise BadInput(f"decode {sight.name} needs a cache that has everything: give no compress")
    tap = engine.tap
    ragged = ragged_view(cache, len(token_ids), sight.method)
    for number, known in spans.items():
        own = ragged.stored[number]
        own.memo["spans"] = {end: groups.to(own.positions.device) for end, groups in known.items()}
    layers = _seen(engine, tap, cache, ragged, token_ids, sight.rows, marked)
    ragged.look(sight, layers)
    if sight.method is not None:
        ragged.choose(sight.method, layers)
    held = sight.hold(ragged)
    held.capacity = engine.max_context
    return held


def begin_recall(
    cache: TwoEndedCache, length: int, sight: Sight, spans: Mapping[int, Mapping[int, Groups]]
) -> RaggedCache:
    """As `Engine.begin_recall`."""
    ragged = filling_view(cache, length)
    for number, known in spans.items():
        own = ragged.stored[number]
        own.memo["spans"] = {end: groups.to(own.positions.device) for end, groups in known.items()}
    ragged.look(sight, [own.seen(number, len(ragged.stored)) for number, own in enumerate(ragged.stored)])
    return ragged


class _Watch:
    """The `Hand` of tokens that run again: notes what a method wants to see."""

    def __init__(self, cache: TwoEndedCache, sums: bool, length: int) -> None:
        self.numbers = numbers_of(cache.layers, TwoEndedLayer)
        self.layers: list[Any] = [_ReadLayer(one) if isinstance(one, TwoEndedLayer) else one for one in cache.layers]
        self.sums = sums
        self.length = length
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.totals: dict[int, torch.Tensor] = {}
        self.scaling: dict[int, tuple[float, float | None]] = {}
        self.windows = {number: layer.window for number, layer in enumerate(cache.stored)}

    def __call__(self, attending: Attending) -> torch.Tensor:
        number = self.numbers[attending.layer]
        self.scaling[number] = attending.scaling, attending.softcap
        if self.windows[number] is None:
            if self.sums:
                self._add(number, attending)
            else:
                self.queries.setdefault(number, []).append(attending.query[0])
        return attend_present(self.layers[attending.layer], attending)

    def _add(self, number: int, attending: Attending) -> None:
        """Add the rows of these queries up."""
        queries, keys = attending.query[0], attending.key[0]
        tokens, end = queries.shape[1], keys.shape[1]
        at = torch.arange(end - tokens, end, device=keys.device)
        positions = positions_of(self.layers[attending.layer], 0, end)
        layer = Layer(
            number, len(self.windows), keys, attending.value[0], positions, end, queries, at, *self.scaling[number]
        )
        none = torch.zeros((queries.shape[0], self.length), dtype=torch.float32, device=keys.device)
        total = self.totals.setdefault(number, none)
        total[:, :end] += layer.attention().sum(2).flatten(0, 1)


class _ReadLayer(TwoEndedLayer):
    """A layer of the cache that is not written to: what tokens that run again would write is there."""

    def __init__(self, layer: TwoEndedLayer) -> None:
        self.__dict__.update(layer.__dict__)  # the same memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next tokens see, as far as it is there."""
        self.before_read()
        first, self.length = self._first_visible(), self.length + key_states.shape[-2]
        return self._keys[:, :, first : self.length], self._values[:, :, first : self.length]

    def _first_visible(self, length: int | None = None) -> int:
        return max(super()._first_visible(length), self.kept_from)


def _seen(
    engine: Any,
    tap: Tap,
    cache: TwoEndedCache,
    ragged: RaggedCache,
    token_ids: Sequence[int],
    wanted: int,
    marked: Sequence[Marked],
) -> list[Layer]:
    """What a method that wants so many rows is shown, of every layer without a window."""
    length = len(token_ids)
    rows = length if wanted == ALL else min(wanted, length)
    watch = _Watch(cache, wanted == ALL, length)
    if rows:
        start = length - rows
        reading = Cache(layers=watch.layers)
        for one in watch.layers:
            if isinstance(one, _ReadLayer):
                one.length = start
        with torch.inference_mode(), tap.handing(watch) as twin:
            for begin in range(start, length, _SPAN):
                end = min(begin + _SPAN, length)
                engine.forward_of(twin, reading, token_ids[begin:end], **engine.arguments)
    layers = []
    for number, own in enumerate(ragged.stored):
        if own.window is not None:
            continue
        layer = own.seen(number, len(ragged.stored))
        layer.marked = marked
        if rows:
            layer.scaling, layer.softcap = watch.scaling[number]
            layer.total = watch.totals.get(number)
            if number in watch.queries:
                layer.queries = torch.cat(watch.queries[number], 1)
                layer.query_positions = torch.arange(length - rows, length, device=own.positions.device)
        layers.append(layer)
    return layers


def check_tap(engine: Any, tap: Tap) -> None:
    """Raise `UnsupportedModel` unless forwards over caches with holes compute what they should.

    In a cache with an entry that must not be seen, a few tokens come out as over a cache without it.
    """
    if getattr(engine.model.config.get_text_config(decoder=True), "attention_chunk_size", None):
        raise UnsupportedModel("its attention sees chunks of the text, not a window: it cannot be tapped")
    tokens = min(_TOKENS, engine.max_context)
    start = min(_START, tokens - 1)
    token_ids = [(7 * token + 3) % engine.vocabulary_size for token in range(tokens)]
    cache = engine.new_cache(tokens)
    engine.compute(cache, token_ids[:start], 0)
    ragged = ragged_view(cache, start)
    for layer in ragged.stored:
        layer.hide_one_more()
    tapped: list[int] = []

    def hand(attending: Attending) -> torch.Tensor:
        tapped.append(attending.layer)
        if attending.key.shape != ragged.layers[attending.layer].keys.shape:
            raise UnsupportedModel("it attends to other keys than it caches (multi-head latent attention)")
        return ragged.attend(attending)

    try:
        with torch.inference_mode(), tap.handing(hand) as twin, ragged.driven():
            output = engine.forward_of(twin, ragged, token_ids[start:], **engine.arguments)
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedModel(f"its attention cannot be tapped: {error!r}") from error
    if tapped != list(numbers_of(ragged.layers, RaggedLayer)):
        raise UnsupportedModel("its attention cannot be tapped: not every layer asks for a registered function, once")
    logits = output.logits[0, -1].float().cpu()
    expected = engine.compute(cache, token_ids[start:], start)
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(engine.model.dtype).eps)
    if not float((logits - expected).norm()) <= tolerance * float(expected.norm()):
        raise UnsupportedModel("its attention depends on more than queries, keys and positions: it cannot be tapped")
