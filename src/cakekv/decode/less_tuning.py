"""Goes on learning the kernels of LESS, of all layers together, from what a frozen model says with and without them.

Layers that were learned one by one have seen the queries of a full cache; behind layers that err, queries are others.
Here a few tokens behind a text are computed as an answer is, every layer over sinks, the newest tokens and a state, and
what is made small is the divergence of the next token's distribution from that over the full cache.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from cakekv.decode.less_kernels import Kernels, attention, grouped, weighed
from cakekv.decode.less_training import FAIR, layers_that_see_everything, projection
from cakekv.engine.tap import Attending
from cakekv.errors import BadInput, CakeError

if TYPE_CHECKING:
    from cakekv.engine.transformers import TransformersEngine

_SPAN = 512


@dataclass(frozen=True)
class Tuning:
    """How to go on.

    Parameters
    ----------
    sinks : int
        So many first tokens are always kept.
    recent : tuple of int
        So many of the newest are; blocks take turns.
    blocks : int
        Of each text: so many places at which an answer is thought to begin, from early to late.
    shortest : int
        Tokens before the earliest of them.
    rows : int
        Tokens of a block.
    batch : int
        Blocks per step.
    rounds : int
        Through all blocks.
    rate : float
        Of learning, at first; it falls to nothing.
    layers : float
        What each layer's own error counts for, beside the divergence.
    seed : int
        Of all that is drawn.
    """

    sinks: int = 4
    recent: tuple[int, ...] = (28, 60, 124)
    blocks: int = 8
    shortest: int = 192
    rows: int = 64
    batch: int = 2
    rounds: int = 3
    rate: float = 1e-3
    layers: float = 0.3
    seed: int = 0


class Block(NamedTuple):
    """A few tokens behind the beginning of a text. Tensors are float16."""

    tokens: list[int]
    recent: int
    before: DynamicCache
    """Of the text's beginning."""
    likely: torch.Tensor
    """(rows, vocabulary): logarithms of what the full cache says behind each token."""
    outputs: dict[int, torch.Tensor]
    """Of each layer that learns, what attention over everything returns: (rows, heads * width)."""


class Tuned(NamedTuple):
    """What was learned, and divergences from the full cache on texts that were held out, in nats."""

    layers: Mapping[int, Kernels]
    kl: float
    before: float
    """With the kernels that learning began with."""
    without: float
    """Without a state."""
    four_more: float
    """Without a state, with four more tokens kept."""


def blocks_of(engine: TransformersEngine, texts: Sequence[Sequence[int]], tuning: Tuning) -> Iterator[list[Block]]:
    """What is learned from: of each text, blocks at several places, the earlier ones as likely as the later ones.

    Raises
    ------
    BadInput
        A text is too short.
    """
    wanted = layers_that_see_everything(engine)
    rng = random.Random(tuning.seed)
    for number, text in enumerate(texts):
        last = len(text) - tuning.rows
        if last < tuning.shortest:
            raise BadInput(f"texts of {len(text)} tokens are too short: give longer ones")
        reach = math.log(last / tuning.shortest)
        times = sorted(math.exp(rng.uniform(0, reach)) for _ in range(tuning.blocks - 1))
        starts = [int(tuning.shortest * one) for one in times] + [last]
        cache, at, found = DynamicCache(config=engine.model.config), 0, []
        for turn, start in enumerate(starts):
            seen: dict[int, torch.Tensor] = {}

            def watch(attending: Attending, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
                output = attending.ordinary()
                if attending.layer in wanted:
                    seen[wanted[attending.layer]] = output[0].flatten(1).to("cpu", torch.float16)
                return output

            with torch.no_grad(), engine.tap.handing(watch) as twin:
                for begin in range(at, start, _SPAN):
                    engine.forward_of(twin, cache, text[begin : min(begin + _SPAN, start)], **engine.arguments)
                at = start
                before = _copy_of(cache, torch.float16)
                seen.clear()
                tokens = list(text[start : start + tuning.rows])
                said = engine.forward_of(twin, _copy_of(before, engine.model.dtype), tokens).logits[0]
            recent = tuning.recent[(number + turn) % len(tuning.recent)]
            found.append(Block(tokens, recent, before, said.float().log_softmax(-1).half(), seen))
        whole = _copy_of(cache, torch.float16)
        for block, start in zip(found, starts, strict=True):  # where nothing was dropped, all share the longest
            for layer, longest in zip(block.before.layers, whole.layers, strict=True):
                if layer.keys.shape[-2] == start:
                    layer.keys, layer.values = longest.keys[..., :start, :], longest.values[..., :start, :]
        yield found


def _copy_of(cache: DynamicCache, dtype: torch.dtype) -> DynamicCache:
    """What a forward goes on with: it puts new keys and values behind copies, and gradients go through them."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    return other


class _Answering:
    """The `Hand` of a block whose layers see what is kept, and a state of the others if there are kernels."""

    def __init__(
        self, block: Block, wanted: Mapping[int, int], kernels: Mapping[int, Kernels], sinks: int, recent: int
    ) -> None:
        self.block, self.wanted, self.kernels = block, wanted, kernels
        self.sinks, self.recent = sinks, recent
        self.off: dict[int, torch.Tensor] = {}
        """Differences of layers' outputs from those of the full cache."""

    def __call__(self, attending: Attending) -> torch.Tensor:
        number = self.wanted.get(attending.layer)
        if number is None:
            return attending.ordinary()
        queries, keys, values = (part[0].float() for part in (attending.query, attending.key, attending.value))
        rows, length = queries.shape[1], keys.shape[1]
        start = length - rows
        first = max(self.sinks, start - self.recent)  # the first row has let go of what is between
        places = torch.arange(length, device=keys.device)
        near, at = torch.cat([places[: self.sinks], places[first:]]), places[start:, None]
        seen = (near <= at) & ((near < self.sinks) | (near >= at - self.recent))
        how = attending.scaling, attending.softcap
        output, log_sum = attention(queries, keys[:, near], values[:, near], seen, *how)
        if number in self.kernels:
            kernels = self.kernels[number]
            gone = slice(self.sinks, max(self.sinks, length - 1 - self.recent))
            features, lost = kernels.of_keys(keys[:, gone]), values[:, gone]
            early = first - self.sinks  # of the first row; each row has let go of one more, once there is one
            grown = features[:, early:, :, None] * pad(lost[:, early:, None], (0, 1), value=1.0)
            begun = features[:, :early].transpose(1, 2) @ pad(lost[:, :early], (0, 1), value=1.0)
            sums = begun[:, None] + pad(grown, (0, 0, 0, 0, rows - grown.shape[1], 0)).cumsum(1)
            asked = grouped(kernels.of_queries(queries), keys.shape[0])  # (kv_heads, queries per head, rows, features)
            answered = (asked.transpose(1, 2) @ sums).transpose(1, 2).flatten(0, 1)  # the last column is the weight
            output = weighed(answered[..., -1], answered[..., :-1], output, log_sum - kernels.offset[:, None])
        rowwise = output.transpose(0, 1)
        self.off[number] = rowwise.flatten(1) - self.block.outputs[number].to(rowwise.device, torch.float32)
        return rowwise[None].to(attending.query.dtype)


def answer_of(
    engine: TransformersEngine, block: Block, kernels: Mapping[int, Kernels], sinks: int, recent: int
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """What is said behind each token of a block, as an answer would; gradients go through it.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    block : Block
        Of `blocks_of`.
    kernels : mapping of int to Kernels
        By the number of the layer; a layer without any sees what is kept, and nothing else.
    sinks, recent : int
        So many first and newest tokens are kept.

    Returns
    -------
    Tensor
        (rows, vocabulary): logits, float32.
    dict
        Of each layer, the difference of its outputs from the full cache's: (rows, heads * width).
    """
    hand = _Answering(block, layers_that_see_everything(engine), kernels, sinks, recent)
    with engine.tap.handing(hand) as twin:
        said = engine.forward_of(twin, _copy_of(block.before, engine.model.dtype), block.tokens).logits[0]
    return said.float(), hand.off


def tune(
    engine: TransformersEngine,
    layers: Mapping[int, Kernels],
    texts: Sequence[Sequence[int]],
    tuning: Tuning,
    on_step: Callable[[int, int, float], None] = lambda step, steps, kl: None,
    on_round: Callable[[Tuned], None] = lambda tuned: None,
) -> Tuned:
    """Go on learning from kernels; a tenth of the texts is held out, and the best on these is what is returned.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    layers : mapping of int to Kernels
        By the number of the layer, as in `Learned`.
    texts : sequence of sequence of int
        Token ids.
    tuning : Tuning
        How.
    on_step : callable
        Is told the step, how many there are, and the divergence of its blocks.
    on_round : callable
        Is told after each round what would be returned.

    Raises
    ------
    CakeError
        Nothing can be learned.
    """
    rng = random.Random(tuning.seed)
    grams = {}
    for at, number in layers_that_see_everything(engine).items():
        weight = projection(engine.model, at)
        grams[number] = (weight.T @ weight / weight.shape[0]).to(engine.device)
    made = list(blocks_of(engine, texts, tuning))
    tenth = max(1, len(made) // 10)
    rng.shuffle(made)
    held, blocks = ([block for each in part for block in each] for part in (made[:tenth], made[tenth:]))
    del made

    def answered(block: Block, kernels: Mapping[int, Kernels], more: int = 0) -> tuple[torch.Tensor, dict[int, Any]]:
        said, offs = answer_of(engine, block, kernels, tuning.sinks, block.recent + more)
        expected = block.likely.float()
        kl = (expected.exp() * (expected - said.log_softmax(-1))).sum(-1).mean()
        return kl, {number: (off * (off @ grams[number])).sum() / len(off) for number, off in offs.items()}

    def judged(kernels: Mapping[int, Kernels], more: int = 0) -> tuple[float, dict[int, float]]:
        with torch.no_grad():
            found = [answered(block, kernels, more) for block in held]
        errors = {number: sum(float(each[number]) for _, each in found) / len(found) for number in grams}
        return sum(float(kl) for kl, _ in found) / len(found), errors

    without, scales = judged({})
    four_more, _ = judged({}, FAIR)
    best, kernels = layers, {number: _copied(one, engine.device) for number, one in layers.items()}
    before = least = judged(kernels)[0]
    learning = [table.requires_grad_() for one in kernels.values() for table in vars(one).values()]
    optimizer = torch.optim.Adam(learning, lr=tuning.rate)
    steps, step = tuning.rounds * (len(blocks) // tuning.batch), 0
    for _ in range(tuning.rounds):
        rng.shuffle(blocks)
        for begin in range(0, len(blocks) - tuning.batch + 1, tuning.batch):
            for group in optimizer.param_groups:
                group["lr"] = tuning.rate * (1 - step / steps) * min(1.0, (step + 1) / 10)
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for block in blocks[begin : begin + tuning.batch]:
                kl, errors = answered(block, kernels)
                own = sum(error / max(scales[number], 1e-12) for number, error in errors.items()) / len(errors)
                # of these tables alone: the model's own weights have no part in it
                slopes = torch.autograd.grad((kl + tuning.layers * own) / tuning.batch, learning)
                for table, slope in zip(learning, slopes, strict=True):
                    table.grad = slope if table.grad is None else table.grad + slope
                total += float(kl.detach()) / tuning.batch
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            step += 1
            on_step(step, steps, total)
        found, _ = judged(kernels)
        if found < least:
            least, best = found, {number: _copied(one, "cpu") for number, one in kernels.items()}
        on_round(Tuned(best, least, before, without, four_more))
    if not math.isfinite(least):
        raise CakeError("nothing could be learned: what the model says is no numbers")
    return Tuned(best, least, before, without, four_more)


def _copied(kernels: Kernels, device: torch.device | str) -> Kernels:
    tables = (getattr(kernels, field.name).detach() for field in fields(kernels))
    return Kernels(*(table.to(device, copy=True) for table in tables))
