"""CacheBlend on a transformers model: its own forward, over layers that drop the positions which are not chosen.

The forward is that of a copy of the model which shares everything with it but the list of its layers. So the model's
own code makes embeddings, masks and rotations, for all positions; from the check layer on, what it hands to a layer is
cut to the chosen rows. The model itself is not touched, and may be used by others meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from cakekv.engine.base import Gate
from cakekv.engine.cache import TwoEndedCache, TwoEndedLayer
from cakekv.engine.versions import Cache
from cakekv.errors import UnsupportedModel
from cakekv.reuse.blend import Blend

_TOKENS, _START, _LAST = 29, 5, 3
_TOLERANCE = 1e-3
"""Share of the logits' or a region's size that may differ; in 16 bits so many roundings:"""
_ROUNDINGS = 16
_ELSEWHERE = "its forward does not go through the list of its layers"


class _Chosen(Exception):
    """The check layer's keys and values are known, and which rows go on from there."""


class _Run:
    """One blend: which rows are left.

    Parameters
    ----------
    way : Blend
        How to choose.
    token_ids : sequence of int
        Of all positions from `start` on.
    start, end : int
        The positions.
    always_from : int
        From here on all are chosen.
    undoes : bool
        Whether to note what is overwritten.
    """

    def __init__(
        self, way: Blend, token_ids: Sequence[int], start: int, end: int, always_from: int, undoes: bool
    ) -> None:
        self.way = way
        self.token_ids = token_ids
        self.start, self.end = start, end
        self.always_from = always_from
        self.rows: torch.Tensor | None = None
        """Those that were chosen, counted from `start`, ascending; None: all, so far."""
        self.passed = 0
        """Layers that were gone through."""
        self._undo: list[tuple[TwoEndedLayer, Any, list[torch.Tensor]]] | None = [] if undoes else None

    @property
    def chooses_all(self) -> bool:
        return self.rows is not None and len(self.rows) == self.end - self.start

    def choose(self, layer: TwoEndedLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Choose the rows, from the check layer's fresh keys and values, before they are written over the old ones."""
        candidates = self.always_from - self.start
        budget = round(self.way.recompute * candidates)
        if budget == candidates or self.way.choice == "random":
            seed = sha256(np.asarray(self.token_ids, dtype=np.int64).tobytes()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
            order = torch.randperm(candidates, generator=generator).to(keys.device)
        else:
            pairs = {"keys": [(keys, layer.plane(0))], "values": [(values, layer.plane(1))]}
            compared = pairs.get(self.way.tensor) or pairs["keys"] + pairs["values"]
            deviation = sum(
                (new[0, :, :candidates].float() - old[0, :, self.start : self.always_from].float()).square().sum((0, 2))
                for new, old in compared
            )
            assert isinstance(deviation, torch.Tensor)
            order = deviation.argsort(descending=True, stable=True)
        rest = torch.arange(candidates, self.end - self.start, device=keys.device)
        self.rows = torch.cat([order[:budget].sort().values, rest])

    def note(self, layer: TwoEndedLayer, where: Any) -> None:
        """Keep what is about to be overwritten, if it may have to be undone."""
        if self._undo is not None:
            self._undo.append((layer, where, [region[:, where].clone() for region in layer.regions]))

    def undo(self) -> None:
        """Put back what was overwritten."""
        for layer, where, before in reversed(self._undo or []):
            layer.write_back(where, before)


class _BlendedLayer(TwoEndedLayer):
    """A layer of the cache, written at the rows that are left."""

    def __init__(self, layer: TwoEndedLayer, index: int, run: _Run) -> None:
        self.__dict__.update(vars(layer))  # the same memory
        self._index, self._run = index, run

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TwoEndedLayer.update`; raises `_Chosen` once rows were dropped."""
        run = self._run
        if run.rows is not None and not run.chooses_all:
            self.before_read()
            where = run.rows + run.start
            run.note(self, where)
            return self.overwrite(key_states, value_states, where, run.start, run.end)
        if chooses := self._index == run.way.check:
            self.before_read()
            run.choose(self, key_states, value_states)
        run.note(self, slice(run.start, run.end))
        seen = super().update(key_states, value_states)
        if chooses and not run.chooses_all:
            raise _Chosen
        return seen


class _DrivenLayer:
    """A decoder layer as the model's forward calls it, handed the rows that are left."""

    def __init__(self, layer: Any, index: int, run: _Run) -> None:
        self._layer, self._index, self._run = layer, index, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        run.passed += 1
        if self._index == run.way.check:
            try:
                return self._layer(hidden, *args, **kwargs)
            except _Chosen:
                hidden = self._cut(hidden)
        if run.rows is None or run.chooses_all:
            return self._layer(hidden, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[-2] != run.end - run.start:
            raise UnsupportedModel(
                "its attention has no mask with a row per position, without which single positions cannot be computed: "
                'load the model with attn_implementation="sdpa" or "eager"'
            )
        return self._layer(hidden, *map(self._cut, args), **{name: self._cut(each) for name, each in kwargs.items()})

    def _cut(self, given: Any) -> Any:
        """What a layer is given, for the rows that are left."""
        if isinstance(given, tuple):
            return tuple(map(self._cut, given))
        if not isinstance(given, torch.Tensor):
            return given
        assert self._run.rows is not None
        tokens = self._run.end - self._run.start
        for dim in (-2, -1):
            if given.ndim >= -dim and given.shape[dim] == tokens:
                return given.index_select(dim, self._run.rows)
        return given


def blend(
    engine: Any,
    cache: TwoEndedCache,
    token_ids: Sequence[int],
    start: int,
    always_from: int,
    way: Blend,
    gate: Gate | None,
) -> tuple[torch.Tensor, list[int]]:
    """As `Engine.blend`, on a `TransformersEngine`."""
    end = start + len(token_ids)
    model = getattr(engine.model, "_orig_mod", engine.model)
    run = _Run(way, token_ids, start, end, always_from, undoes=gate is not None)
    cache.set_length(start)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(cache.forwarding())
        if gate is not None:
            stack.enter_context(cache.gated(gate))
        layers = [
            _BlendedLayer(layer, index, run) if isinstance(layer, TwoEndedLayer) else layer
            for index, layer in enumerate(cache.layers)
        ]
        path, modules = _layers_of(model, len(layers))
        driven = [_DrivenLayer(module, index, run) for index, module in enumerate(modules)]
        try:
            output = engine.forward_of(_with_layers(model, path, driven), Cache(layers=layers), token_ids)
        except _Chosen:
            raise UnsupportedModel(_ELSEWHERE) from None
        except BaseException:
            run.undo()
            raise
        if run.passed != len(driven):
            raise UnsupportedModel(_ELSEWHERE)
        logits: torch.Tensor = output.logits[0, -1].to("cpu", torch.float32, copy=True)
    for layer, written in zip(cache.layers, layers, strict=True):
        if isinstance(written, _BlendedLayer):
            layer.length = written.length
    return logits, [] if run.rows is None else (run.rows + start).tolist()


def check_blends(engine: Any, way: Blend) -> None:
    """Raise `UnsupportedModel` unless layers that are driven one by one compute what the model's own forward does.

    In a cache that is right already, some positions are computed again: it has to stay as it is.
    """
    if way.check >= len(engine.new_cache(1).layers):
        raise UnsupportedModel(f"it has no layer {way.check} to check deviations in")
    tokens = min(_TOKENS, engine.max_context)
    token_ids = [(7 * token + 3) % engine.vocabulary_size for token in range(tokens)]
    always_from = max(_START, tokens - _LAST)
    right, blended = engine.new_cache(tokens), engine.new_cache(tokens)
    expected = engine.compute(right, token_ids, 0)
    engine.compute(blended, token_ids, 0)
    if not isinstance(blended.layers[way.check], TwoEndedLayer):
        raise UnsupportedModel(f"its layer {way.check} keeps no keys and values: check another one")
    for index, layer in enumerate(blended.layers):
        if isinstance(layer, TwoEndedLayer):
            for region in layer.regions:  # it must not matter what was there
                region[:, _START if index <= way.check else always_from :] += 1
    probe = Blend(recompute=0.5, check=way.check, choice="random")
    try:
        logits, _ = blend(engine, blended, token_ids[_START:], _START, always_from, probe, None)
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedModel(f"its layers cannot be driven one by one: {error!r}") from error
    pairs = [(logits, expected)]
    for one, other in zip(blended.stored, right.stored, strict=True):
        pairs += zip(one.regions, other.regions, strict=True)
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(engine.model.dtype).eps)
    for one, other in pairs:
        if not float((one.double() - other.double()).norm()) <= tolerance * float(other.double().norm()):
            raise UnsupportedModel("layers that are driven one by one do not compute what its own forward does")


def _layers_of(model: Any, layers: int) -> tuple[str, Iterator[Any]]:
    """The name of the list of a model's layers, and these."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return name, iter(module)
    raise UnsupportedModel(f"it has no list of its {layers} layers")


def _with_layers(model: Any, path: str, layers: list[_DrivenLayer]) -> Any:
    """A copy of a model that has other layers, and shares everything else with it."""
    name, _, rest = path.partition(".")
    twin = copy.copy(model)
    modules = dict(model._modules)
    if rest:
        modules[name] = _with_layers(modules[name], rest, layers)
    else:
        del modules[name]
        vars(twin)[name] = layers
    twin.__dict__["_modules"] = modules
    twin.__dict__["_compiled_call_impl"] = None  # it would call the model itself
    return twin
