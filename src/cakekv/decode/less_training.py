"""Learns the kernels of LESS (arXiv 2402.09398), layer by layer, from a frozen model's own queries, keys and values.

Of a text, each token attends to the first tokens and the newest ones, as `sink_recent` would leave them, and has the
features of those between. What is made small is the difference from attention to everything, after the layer's output
projection, at the tokens that miss something.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cakekv.decode.less_kernels import Kernels, attention, grouped, weighed
from cakekv.engine.cache import TwoEndedLayer
from cakekv.engine.tap import Attending
from cakekv.errors import BadInput, CakeError, UnsupportedModel

if TYPE_CHECKING:
    from cakekv.engine.transformers import TransformersEngine

_MOST_BYTES = 3 << 30
"""Queries, keys and values that are held at once. If there are more, texts are computed again for the next layers."""
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_TOLERANCE = 1e-2
FAIR = 4
"""So many more tokens would take the memory of a state of 8 features, and its kernels' share of a few sequences."""


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Parameters
    ----------
    sinks : int
        So many first tokens are always kept.
    recent : tuple of int
        So many of the newest are; texts take turns.
    features, hidden : int
        Sizes of the kernels.
    epochs, batch : int
        Rounds through all texts, and texts per step.
    rate : float
        Of learning; halved every 10 epochs.
    seed : int
        Of all that is drawn.
    """

    sinks: int = 4
    recent: tuple[int, ...] = (28, 60, 124)
    features: int = 8
    hidden: int = 128
    epochs: int = 10
    batch: int = 2
    rate: float = 1e-3
    seed: int = 0

    def for_texts(self, tokens: int) -> Settings:
        """The same, without more newest tokens than texts of this length leave room for; at least a few.

        Raises
        ------
        BadInput
            They leave none.
        """
        most = tokens // 2 - self.sinks
        if most < 1:
            raise BadInput(f"texts of {tokens} tokens are too short to learn what is missing: give longer ones")
        return replace(self, recent=tuple(recent for recent in self.recent if recent <= most) or (most,))


class Seen(NamedTuple):
    """One layer on one text, float16 or float32."""

    queries: torch.Tensor
    """(heads, tokens, width), after RoPE."""
    keys: torch.Tensor
    """(kv_heads, tokens, width)"""
    values: torch.Tensor


class LayerSeen(NamedTuple):
    """One layer on all texts."""

    number: int
    """Among the layers that keep something."""
    scaling: float
    softcap: float | None
    projection: torch.Tensor
    """Of its output: (outputs, heads * width), float32."""
    texts: list[Seen]

    @property
    def gram(self) -> torch.Tensor:
        """Makes a mean square, after the projection, of what goes into it: x' G x."""
        return self.projection.T @ self.projection / self.projection.shape[0]


class Example(NamedTuple):
    """What a text's tokens that miss something have to go on. The nth query misses keys up to the nth, inclusive."""

    queries: torch.Tensor
    """(heads, n, width)"""
    keys: torch.Tensor
    """(kv_heads, n, width)"""
    values: torch.Tensor
    kept: torch.Tensor
    """(heads, n, width): attention over what is kept."""
    log_sum: torch.Tensor
    """(heads, n): logarithm of the sum of its weights."""
    missed: torch.Tensor
    """(heads, n): the same of what is missing."""
    whole: torch.Tensor
    """(heads, n, width): attention over everything."""
    more: torch.Tensor | None = None
    """As `kept`, if `FAIR` more of the newest tokens are kept."""


class Fitted(NamedTuple):
    """What one layer has learned, and how well."""

    kernels: Kernels
    error: float
    """Mean square difference from full attention, after the output projection, on texts that were held out."""
    without: float
    """The same without a state."""
    four_more: float
    """The same without a state, with four more tokens kept."""


def collect(engine: TransformersEngine, texts: Sequence[Sequence[int]]) -> Iterator[LayerSeen]:
    """What each layer that sees everything makes of texts, one layer after the other.

    Raises
    ------
    UnsupportedModel
        A layer attends in a way of its own, or its output projection cannot be told.
    """
    layers, numbers = engine.new_cache(1).layers, layers_that_see_everything(engine)
    wanted = list(numbers)
    tokens = sum(map(len, texts))
    per_layer = max(2 * tokens * _elements(engine, layers[at]) for at in wanted)
    together = max(1, _MOST_BYTES // per_layer)
    for first in range(0, len(wanted), together):
        group = wanted[first : first + together]
        watch = _Watch(set(group))
        for token_ids in texts:
            with torch.inference_mode(), engine.tap.handing(watch) as twin:
                engine.forward_of(twin, engine.new_cache(len(token_ids)), token_ids, **engine.arguments)
        for at in group:
            yield LayerSeen(numbers[at], *watch.how[at], projection(engine.model, at), watch.seen.pop(at))


def layers_that_see_everything(engine: TransformersEngine) -> dict[int, int]:
    """By the model's number of a layer, its number among those that keep something."""
    layers = engine.new_cache(1).layers
    stored = [at for at, layer in enumerate(layers) if isinstance(layer, TwoEndedLayer)]
    return {at: number for number, at in enumerate(stored) if layers[at].window is None}


class _Watch:
    """The `Hand` of forwards over whole texts."""

    def __init__(self, wanted: set[int]) -> None:
        self.wanted = wanted
        self.seen: dict[int, list[Seen]] = {}
        self.how: dict[int, tuple[float, float | None]] = {}

    def __call__(self, attending: Attending) -> torch.Tensor:
        output = attending.ordinary()
        at = attending.layer
        if at in self.wanted:
            parts = [part[0].to("cpu", torch.float32) for part in (attending.query, attending.key, attending.value)]
            if at not in self.how:
                self.how[at] = attending.scaling, attending.softcap
                expected = output[0].transpose(0, 1).to("cpu", torch.float32)
                there = torch.ones(2 * parts[0].shape[1:2], dtype=torch.bool).tril()
                found, _ = attention(parts[0], parts[1], parts[2], there, *self.how[at])
                if not float((found - expected).norm()) <= _TOLERANCE * float(expected.norm()):
                    raise UnsupportedModel(f"layer {at} attends in a way of its own, which LESS does not know")
            self.seen.setdefault(at, []).append(Seen(*(part.to(torch.float16) for part in parts)))
        return output


def example(layer: LayerSeen, text: Seen, sinks: int, recent: int, judged: bool = False) -> Example:
    """What is known of one text; kept are `sinks` first tokens, `recent` newest ones, and each token itself.

    Of one that is judged, also what more tokens would do.
    """
    queries, keys, values = (part.float() for part in text)
    tokens, first = queries.shape[1], sinks + recent + 1
    at = torch.arange(first, tokens)[:, None]
    other = torch.arange(tokens)
    gone = (other >= sinks) & (other < at - recent)
    late = queries[:, first:]
    how = layer.scaling, layer.softcap
    kept, log_sum = attention(late, keys, values, (other <= at) & ~gone, *how)
    _, missed = attention(late, keys, values, gone, *how)
    whole, _ = attention(late, keys, values, other <= at, *how)
    more = None
    if judged:
        more, _ = attention(late, keys, values, (other <= at) & ((other < sinks) | (other >= at - recent - FAIR)), *how)
    between = slice(sinks, tokens - 1 - recent)
    return Example(late, keys[:, between], values[:, between], kept, log_sum, missed, whole, more)


def fit(
    layer: LayerSeen, settings: Settings, on_epoch: Callable[[int, float], None] = lambda epoch, error: None
) -> Fitted:
    """Learn one layer's kernels; a tenth of the texts is held out, and the best on these is what is returned.

    Raises
    ------
    CakeError
        The layer's numbers are none that can be learned from.
    """
    rng = random.Random(settings.seed)
    texts = [(text, settings.recent[number % len(settings.recent)]) for number, text in enumerate(layer.texts)]
    rng.shuffle(texts)
    tenth = max(1, len(texts) // 10)
    held, made = (
        [example(layer, text, settings.sinks, recent, judged) for text, recent in part]
        for part, judged in ((texts[:tenth], True), (texts[tenth:], False))
    )
    batches = [made[begin : begin + settings.batch] for begin in range(0, len(made), settings.batch)]
    gram = layer.gram
    kernels = _begin(layer.texts[0], made, settings, torch.Generator().manual_seed(settings.seed + layer.number))
    learning = [table for name, table in vars(kernels).items() if name != "offset"]
    for table in learning:
        table.requires_grad_()
    optimizer = torch.optim.Adam(learning, lr=settings.rate)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    best, least = kernels, float("inf")
    for epoch in range(settings.epochs):
        rng.shuffle(batches)
        for batch in batches:
            loss = _loss(kernels, batch, gram)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        halving.step()
        with torch.no_grad():
            error = error_of([output_of(kernels, one) for one in held], held, gram)
        on_epoch(epoch, error)
        if error < least:
            least, best = error, Kernels(**{name: table.detach().clone() for name, table in vars(kernels).items()})
    if best is kernels:
        raise CakeError(f"nothing could be learned of layer {layer.number}: its errors are no numbers")
    return Fitted(best, least, error_of([one.kept for one in held], held, gram), error_of(_more(held), held, gram))


def output_of(kernels: Kernels, one: Example) -> torch.Tensor:
    """What attention returns with what is kept, and the features of what is missing: (heads, n, width)."""
    features = kernels.of_queries(one.queries)
    keys = kernels.of_keys(one.keys)
    groups = grouped(features, keys.shape[0]).transpose(1, 2)  # (kv_heads, n, queries per head, features)
    weight = torch.einsum("hngr,hnr->hgn", groups, keys.cumsum(1)).flatten(0, 1)
    products = (keys[..., None] * one.values[:, :, None]).cumsum(1)
    value = (groups @ products).transpose(1, 2).flatten(0, 1)
    return weighed(weight, value, one.kept, one.log_sum - kernels.offset[:, None])


def _loss(kernels: Kernels, batch: Sequence[Example], gram: torch.Tensor) -> torch.Tensor:
    """Has the gradient of the mean square error; half the products that autograd would take."""
    total = torch.zeros((), dtype=torch.float32)
    for one in batch:
        off = (output_of(kernels, one) - one.whole).transpose(0, 1).flatten(1)
        total = total + 2 * (off * (off.detach() @ gram)).sum() / len(off)
    return total / len(batch)


def error_of(outputs: Sequence[torch.Tensor], made: Sequence[Example], gram: torch.Tensor) -> float:
    """Mean square difference from full attention, after the output projection."""
    errors = []
    for output, one in zip(outputs, made, strict=True):
        off = (output - one.whole).transpose(0, 1).flatten(1)
        errors.append(float((off * (off @ gram)).sum() / len(off)))
    return sum(errors) / len(errors)


def _more(made: Sequence[Example]) -> list[torch.Tensor]:
    return [one.more for one in made if one.more is not None]


def _begin(text: Seen, made: Sequence[Example], settings: Settings, generator: torch.Generator) -> Kernels:
    """Kernels that say next to nothing yet."""
    heads, width = text.queries.shape[0], text.queries.shape[2]
    kv_heads, hidden, features = text.keys.shape[0], settings.hidden, settings.features

    def drawn(*sizes: int) -> torch.Tensor:
        limit: float = (6 / (sizes[-1] + sizes[-2])) ** 0.5
        return (torch.rand(sizes, generator=generator, dtype=torch.float32) * 2 - 1) * limit

    small = torch.full((kv_heads, features), 1e-4, dtype=torch.float32)
    return Kernels(
        query_in=drawn(heads, width, hidden),
        query_out=drawn(heads, hidden, features),
        key_in=drawn(kv_heads, width, hidden),
        key_out=drawn(kv_heads, hidden, features),
        scale=small,
        residual=small.clone(),
        mixing=drawn(kv_heads, features, features),
        offset=torch.cat([one.missed for one in made], 1).mean(1),
    )


def _elements(engine: TransformersEngine, layer: TwoEndedLayer) -> int:
    """Of queries, keys and values of a token, at most."""
    config: Any = engine.model.config.get_text_config(decoder=True)
    keys, values = (layer.plane(number) for number in (0, 1))
    return int(config.num_attention_heads * keys.shape[3] + keys[0, :, 0].numel() + values[0, :, 0].numel())


def projection(model: Any, at: int) -> torch.Tensor:
    """The weight of the output projection of the attention of layer `at`."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == at:
            for name in _PROJECTIONS:
                weight = getattr(getattr(module, name, None), "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim == 2:
                    conv = type(getattr(module, name)).__name__ == "Conv1D"
                    return (weight.T if conv else weight).detach().to("cpu", torch.float32)
    raise UnsupportedModel(
        f"the output projection of layer {at} cannot be told: it is none of {', '.join(_PROJECTIONS)}"
    )
