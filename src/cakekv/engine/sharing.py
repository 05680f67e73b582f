"""KVSharer (arXiv 2410.18517): layers that attend to what an earlier layer keeps, and so need not keep anything.

Which layers, is found out once per model: those whose keys and values are *least* alike come first, as long as the
model's last hidden states still point about where they did. The model is not changed, and still computes keys and
values in all layers; those of shared layers are thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from blake3 import blake3

from cakekv.calibration import cache_folder, write_cached
from cakekv.engine.cache import LayerShape, TwoEndedCache
from cakekv.errors import BadInput
from cakekv.keys import canonical
from cakekv.learned import read_learned

if TYPE_CHECKING:
    from cakekv.engine.transformers import TransformersEngine

LEAST_COSINE = 0.5
"""Of last hidden states, flattened, with and without sharing; on average over the texts."""
_MAX_BYTES = 1 << 20
_MOST_LAYERS = 4096

Pair = tuple[int, int]
"""(earlier, later) layer."""


@dataclass(frozen=True)
class LayerMap:
    """Which layers of a model share what another keeps.

    Parameters
    ----------
    pairs : sequence of (int, int)
        In the order in which they were chosen: layer, and the earlier layer whose keys and values it attends to. If
        that one shares itself, it is what that one attends to.

    Raises
    ------
    BadInput
        That makes no sense.
    """

    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        shared = [later for _, later in self.pairs]
        if len(set(shared)) < len(shared) or not all(0 <= earlier < later for earlier, later in self.pairs):
            raise BadInput(
                f"a map of layers has pairs of an earlier and a later layer, each the later one of one pair at most; "
                f"not {self.pairs!r:.200}"
            )

    @cached_property
    def sources(self) -> dict[int, int]:
        """By layer that shares: the layer whose keys and values it attends to, which keeps its own."""
        sources: dict[int, int] = {}
        for earlier, later in self.pairs:
            source = sources.get(earlier, earlier)
            sources = {layer: source if at == later else at for layer, at in sources.items()}
            sources[later] = source
        return sources

    @cached_property
    def digest(self) -> str:
        """Names what the map does; enters into every key."""
        text = canonical(sorted(self.sources.items()))
        return blake3(text.encode(), derive_key_context="cakekv layers shared").hexdigest(16)

    def first(self, count: int) -> LayerMap:
        """The map with the pairs chosen first.

        Raises
        ------
        BadInput
            There are not so many.
        """
        if not 1 <= count <= len(self.pairs):
            raise BadInput(
                f"share is {count}, but the model's map has 1 to {len(self.pairs)} layers to share: "
                "run cakekv share calibrate with another --layers"
            )
        return LayerMap(self.pairs[:count])

    def kept(self, shapes: Sequence[LayerShape | None]) -> list[LayerShape | None]:
        """What each layer of a model keeps then.

        Raises
        ------
        BadInput
            It is not for such a model.
        """
        for later, earlier in self.sources.items():
            if later >= len(shapes) or (pair := (shapes[earlier], shapes[later]))[0] != pair[1] or pair[0] is None:
                raise BadInput(
                    f"the map of shared layers is of another model: layer {later} cannot attend to what layer "
                    f"{earlier} keeps. Run cakekv share calibrate with this model"
                )
            if pair[0].window is not None:
                raise BadInput(f"layer {later} has a window, and cannot share what layer {earlier} keeps")
        return [None if at in self.sources else shape for at, shape in enumerate(shapes)]

    def to_bytes(self, names: Sequence[str]) -> bytes:
        """As it is kept in a file, for a model of these names."""
        return json.dumps({"cakekv": "share", "version": 1, "pairs": self.pairs, "weights": list(names)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes, names: Iterable[str]) -> Self:
        """Read what `to_bytes` wrote, for a model that has one of these names.

        Raises
        ------
        BadInput
            It cannot be that, or is for another model.
        """
        try:
            read: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadInput("it is none") from error
        if not isinstance(read, dict) or read.get("cakekv") != "share" or read.get("version") != 1:
            raise BadInput("it is none, or of another version of cakekv")
        pairs, weights = read.get("pairs"), read.get("weights")
        if not isinstance(pairs, list) or not 1 <= len(pairs) <= _MOST_LAYERS or not isinstance(weights, list):
            raise BadInput("it has no pairs of layers")
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or any(type(one) is not int for one in pair):
                raise BadInput(f"{pair!r:.60} is no pair of layers")
        if not any(name in weights for name in names):
            raise BadInput("it is of another model")
        return cls(tuple((earlier, later) for earlier, later in pairs))


def map_file(weights: str) -> Path:
    """Where the map of a model with these weights (a fingerprint) is kept."""
    name = blake3(weights.encode(), derive_key_context="cakekv share").hexdigest(16)
    return cache_folder() / "share" / f"{name}.json"


def find_map(share: int | str | PathLike[str], names: Iterable[str]) -> LayerMap:
    """The map of the model of these names.

    Parameters
    ----------
    share : int, str, or path
        How many layers of the map that is kept for the model; or a file, whose map is taken whole.

    Raises
    ------
    BadInput
        There is none, or it is not sound, or not for this model.
    """
    names = list(names)
    if isinstance(share, bool) or not isinstance(share, int | str | PathLike):
        raise BadInput(f"share is a number of layers, or a file that cakekv share calibrate wrote; not {share!r:.60}")
    text = str(share)
    if not (text.isascii() and text.isdigit()):
        return _read(Path(share), names)  # type: ignore[arg-type]
    for name in names:
        if (file := map_file(name)).exists():
            return _read(file, names).first(int(text))
    raise BadInput(
        f"share needs a map of this model's layers, and there is none in {cache_folder() / 'share'}: run "
        "`cakekv share calibrate --model MODEL` with this model, once"
    )


def _read(file: Path, names: Sequence[str]) -> LayerMap:
    def read(data: bytes) -> LayerMap:
        return LayerMap.from_bytes(data, names)

    return read_learned(file, _MAX_BYTES, read, "map of layers", "run cakekv share calibrate")


def write_map(data: bytes, files: Sequence[Path]) -> None:
    """Write a map, as `LayerMap.to_bytes` made it, into these files. Raises `CakeError` if that fails."""
    for file in files:
        write_cached(file, data, "map of layers")


class Calibration:
    """Looks at a model's layers on some texts, and tries maps out.

    Parameters
    ----------
    engine : TransformersEngine
        The model's, without sharing.
    texts : sequence of sequences of int
        Token ids, of one length.
    """

    def __init__(self, engine: TransformersEngine, texts: Sequence[Sequence[int]]) -> None:
        self._engine, self._texts = engine, texts
        self._means: list[list[torch.Tensor] | None] = []
        self._hidden: list[torch.Tensor] = []
        sums: list[list[torch.Tensor] | None] = [None if shape is None else [] for shape in engine.shapes]
        for text in texts:
            cache, hidden = self._run(text, None)
            self._hidden.append(hidden)
            for sum_, layer in zip(sums, cache.layers, strict=True):
                if sum_ is not None:
                    planes = [layer.plane(number)[0].float() for number in (0, 1)]
                    sum_[:] = [one + other for one, other in zip(sum_, planes, strict=True)] if sum_ else planes
        self._means = [None if one is None else [part / len(texts) for part in one] for one in sums]

    def distances(self) -> Mapping[Pair, float]:
        """How unlike two layers' mean keys and values are, of all pairs that could share."""
        shapes, found = self._engine.shapes, {}
        for one, other in combinations(range(len(shapes)), 2):
            shape = shapes[one]
            if shape is not None and shape == shapes[other] and shape.window is None:
                planes = zip(self._means[one] or (), self._means[other] or (), strict=True)
                away = [float((first - second).norm(dim=-1).mean()) for first, second in planes]
                found[one, other] = sum(away) / len(away)
        return found

    def cosine(self, share: LayerMap) -> float:
        """Of last hidden states with a map and without, meaned over the texts."""
        cosines = []
        for text, expected in zip(self._texts, self._hidden, strict=True):
            _, hidden = self._run(text, share)
            cosines.append(float(torch.nn.functional.cosine_similarity(hidden, expected, dim=0)))
        return sum(cosines) / len(cosines)

    def choose(
        self, ranked: Iterable[Pair], layers: int, on_try: Callable[[Pair, float], None] = lambda pair, cosine: None
    ) -> LayerMap:
        """The first pairs of a ranking that leave the model's hidden states about what they were.

        Parameters
        ----------
        ranked : iterable of (int, int)
            Pairs of an earlier and a later layer, to be tried in this order.
        layers : int
            How many layers are to share.
        on_try : callable
            Told of every pair, and the cosine with it.

        Returns
        -------
        LayerMap
            With fewer layers, if there are not so many.
        """
        chosen = LayerMap(())
        for pair in ranked:
            if len(chosen.pairs) == layers:
                break
            if pair[1] in chosen.sources:
                continue
            more = LayerMap((*chosen.pairs, pair))
            cosine = self.cosine(more)
            on_try(pair, cosine)
            if cosine > LEAST_COSINE:
                chosen = more
        return chosen

    def _run(self, text: Sequence[int], share: LayerMap | None) -> tuple[TwoEndedCache, torch.Tensor]:
        engine = self._engine
        cache = cache_with(engine, len(text), share)
        with torch.inference_mode():
            output = engine.forward(cache, text, output_hidden_states=True, **engine.arguments)
        return cache, output.hidden_states[-1].flatten().float().cpu()


def cache_with(engine: TransformersEngine, tokens: int, share: LayerMap | None) -> TwoEndedCache:
    """A cache for a forward of the model with some layers shared."""
    if share is None:
        return TwoEndedCache(engine.shapes, tokens, engine.device)
    return TwoEndedCache(share.kept(engine.shapes), tokens, engine.device, sources=share.sources)


def most_unlike_first(distances: Mapping[Pair, float]) -> list[Pair]:
    """The ranking of KVSharer."""
    return sorted(distances, key=lambda pair: (-distances[pair], pair))
