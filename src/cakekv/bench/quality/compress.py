"""The judge of compressed caches: answers over what a method keeps, or a sight sees, against those over all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch

from cakekv.bench.quality.documents import Document
from cakekv.bench.quality.earlier import check_settings, went_on
from cakekv.bench.quality.intervals import figures_of
from cakekv.bench.quality.judge import Judge, Reference, paired
from cakekv.codec.raw import Raw
from cakekv.codec.rows import Rows
from cakekv.compress import method_named
from cakekv.compress.base import Layer, Marked, Merged, Method
from cakekv.decode import sight_named
from cakekv.decode.base import Sight
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.ragged import RaggedCache, ragged_view
from cakekv.engine.sharing import LayerMap, cache_with
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput

EXACT = "exact"
"""The name of the full cache's own figures."""
Way: TypeAlias = Method | Sight | LayerMap
"""What is judged."""
COMPRESS, DECODE, SHARE = "compress", "decode", "share"
_SAME = ("model", "dtype", "tokens", "continuation", "questions", "chunk_tokens")
_CHUNKS = {"chunk_tokens": 64}
"""Where settings do not say."""
_SPAN = 512
_SINGLY = 4
"""Tokens that are fed one by one even where all could be fed at once, to see how long a step takes."""


@dataclass(frozen=True)
class Measured:
    """What one method, or one sight, does to the answers about one document.

    Attributes
    ----------
    kind : str
        The document's.
    kl : float
        Mean Kullback-Leibler divergence of the next-token distribution from the full cache's, in nats, over the
        continuation; or over the needles' answers, where questions come first. What the prompt itself predicts, before
        anything is let go of, does not count.
    agreement : float
        Share of those positions at which the likeliest token is the same.
    nats : float
        Mean negative log-likelihood of the tokens there, in nats.
    asked, found : int
        Needles that the full cache answers, and those of them that are answered.
    gold_nats : float
        Mean log-likelihood of the tokens of all needles' answers.
    kept : float
        Of the entries of all layers and heads of the prompt, the share that is kept. This and what follows is of the
        last prompt, where questions come first and there are several.
    cache_bytes : int
        Memory of what is kept, without what sights and methods note beside it. What is loaded without some of its rows
        has room for them.
    choose_s : float
        From the complete cache to the one that is gone on with.
    token_s : float
        A step of the answer: the median.
    """

    kind: str
    kl: float
    agreement: float
    nats: float
    asked: int
    found: int
    gold_nats: float
    kept: float
    cache_bytes: int
    choose_s: float
    token_s: float


def way_named(option: str, recipe: str) -> Method | Sight:
    """What an option, "compress" or "decode", names.

    Raises
    ------
    BadInput
        There is no such method or sight.
    """
    return sight_named(recipe) if option == DECODE else method_named(recipe)


def _way_or_map(option: str, recipe: str) -> Way:
    """As `way_named`; and of "share", "share:11>27,9>25" names a map of layers, an earlier one and a later one each."""
    if option != SHARE:
        return way_named(option, recipe)
    pairs = re.findall(r"(\d+)>(\d+)", recipe)
    if not pairs or recipe != f"share:{','.join(map('>'.join, pairs))}":
        raise BadInput(f"{recipe!r:.80} is no map of layers, such as share:11>27,9>25")
    return LayerMap(tuple((int(earlier), int(later)) for earlier, later in pairs))


class _Part(NamedTuple):
    """What is asked of a model behind a prompt."""

    prompt: list[int]
    tail: list[int]
    marked: list[Marked]
    predicted: int
    """So many predictions, from that of the tail's second token on, are compared with the full cache's."""
    needles: list[range]
    """Where in the tail the answers are."""


class _Said(NamedTuple):
    """What is told of a part: what it adds up to is in `Measured`."""

    compared: tuple[float, float, float]
    """KL, agreement and nats."""
    found: list[bool]
    gold_nats: float
    gold_tokens: int


def judge(
    engine: TransformersEngine,
    document: Document,
    ways: Mapping[str, Way],
    *,
    question_first: bool = False,
    exact: TwoEndedCache | None = None,
    chunk_tokens: int = 64,
) -> dict[str, Measured]:
    """Compare methods and sights with the full cache, whose own figures come first, as `EXACT`.

    The model is led along the continuation and along each needle's question and answer. Behind a method that acts at
    `decode`, and over a sight, tokens come one by one, or as many at once as the method's `stride`; else all at once.
    What a method leaves that acts at `store` is what a prompt has of which all full chunks were stored and loaded.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    document : Document
        What is read and what is asked.
    ways : mapping of str to Method, Sight or LayerMap
        By name. With layers shared, the whole prompt is computed again.
    question_first : bool
        Whether the question about a needle is part of the prompt, marked "question", when a method chooses. Else it
        comes afterwards, like the continuation.
    exact : TwoEndedCache or None
        Covers the context, and has room for the longest tail; computed here if not given.
    chunk_tokens : int
        Of which a method chooses that acts at `store`.
    """
    parts = _parts(document, question_first)
    context = document.context
    if exact is None:
        exact = engine.new_cache(max(len(part.prompt) + len(part.tail) for part in parts))
        for start in range(0, len(context), _SPAN):
            engine.compute(exact, context[start : start + _SPAN], start)
    said: dict[str, list[_Said]] = {name: [] for name in (EXACT, *ways)}
    sizes: dict[str, tuple[float, int, float, float]] = {}
    asked: list[bool] = []
    for part in parts:
        end = len(part.prompt)
        if end > len(context):
            exact.set_length(len(context))
            engine.compute(exact, part.prompt[len(context) :], len(context))
        logits, token_s = follow_singly(engine, exact, part.tail[:-1], end, _steps(len(part.tail) - 1, None))
        reference = Reference(logits, part.predicted)
        said[EXACT].append(_said(part, reference, logits))
        asked += said[EXACT][-1].found
        sizes[EXACT] = 1.0, ragged_view(exact, end).held_bytes, 0.0, token_s
        shown: dict[int, _Shown] = {}
        for name, way in ways.items():
            exact.set_length(end)
            left, choose_s = _left(engine, exact, part, way, shown, chunk_tokens)
            if isinstance(way, LayerMap):
                kept = 1 - len(way.pairs) / len(engine.shapes)
                size = round(kept * sizes[EXACT][1])
            else:
                cache = left if isinstance(left, RaggedCache) else ragged_view(left, end)
                kept, size = cache.kept_share, cache.held_bytes
            singly = isinstance(way, Sight) or (isinstance(way, Method) and "decode" in way.at)
            stride = getattr(way, "stride", 1) if singly else None
            logits, token_s = follow_singly(engine, left, part.tail[:-1], end, _steps(len(part.tail) - 1, stride))
            said[name].append(_said(part, reference, logits))
            sizes[name] = kept, size, choose_s, token_s
    return {name: _total(document.kind, ones, asked, sizes[name]) for name, ones in said.items()}


@dataclass(frozen=True)
class _Shown(Method):
    """Looks at rows of a prompt for all methods that want as many, so that it is done once."""

    name: ClassVar[str] = "shown"
    rows: int = 0
    layers: list[Layer] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    """Seconds, once it has looked."""
    method: Method | None = None

    @property
    def at(self) -> frozenset[str]:
        return self.method.at if self.method else frozenset({"prefill"})

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        if self.method is None:
            self.layers.extend(layers)
            return [None] * len(layers)
        for layer, seen in zip(layers, self.layers, strict=True):
            for name in ("queries", "query_positions", "scaling", "softcap", "total"):
                setattr(layer, name, getattr(seen, name))
        return self.method.keep(layers)

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
        assert self.method is not None
        return self.method.merge(layer, kept)

    def step(self, layer: Layer) -> torch.Tensor | None:
        assert self.method is not None
        return self.method.step(layer)


def _left(
    engine: TransformersEngine,
    exact: TwoEndedCache,
    part: _Part,
    way: Way,
    shown: dict[int, _Shown],
    chunk_tokens: int,
) -> tuple[TwoEndedCache | RaggedCache, float]:
    """What a method leaves of the full cache, or a sight sees, and the seconds it took: also where they were shared."""
    if isinstance(way, LayerMap):
        shared = cache_with(engine, exact.capacity, way)
        for start in range(0, len(part.prompt), _SPAN):
            engine.compute(shared, part.prompt[start : start + _SPAN], start)
        return shared, 0.0  # nothing was chosen
    looked_s = 0.0
    if isinstance(way, Method) and "store" in way.at:
        return _loaded(engine, exact, part.prompt, Rows(method=way, inner=Raw()), chunk_tokens)
    if isinstance(way, Method) and way.rows and way.stride == 1 and not way.compact:
        began = perf_counter()
        if way.rows not in shown:
            shown[way.rows] = _Shown(way.rows)
            engine.compress(exact, part.prompt, shown[way.rows], part.marked)
            shown[way.rows].took.append(perf_counter() - began)
        way, looked_s = replace(shown[way.rows], rows=0, method=way), shown[way.rows].took[0]
    began = perf_counter()
    if isinstance(way, Sight):
        left: TwoEndedCache | RaggedCache = engine.look(exact, part.prompt, way, part.marked)
    else:
        left = engine.compress(exact, part.prompt, way, part.marked)
    return left, looked_s + perf_counter() - began


def _loaded(
    engine: TransformersEngine, exact: TwoEndedCache, prompt: Sequence[int], codec: Rows, chunk_tokens: int
) -> tuple[TwoEndedCache, float]:
    """A prompt's cache as if all of its full chunks were loaded, and the seconds of encoding and decoding them."""
    cache, end = engine.new_sparse_cache(exact.capacity), len(prompt)
    for theirs, ours in zip(exact.stored, cache.stored, strict=True):
        for source, target in zip(theirs.regions, ours.regions, strict=True):
            target[:, :end] = source[:, :end]
    began = perf_counter()
    Judge(engine, chunk_tokens).transcode(cache, 0, end, codec)
    took = perf_counter() - began
    behind = min(end // chunk_tokens * chunk_tokens, end - 1)
    engine.compute(cache, prompt[behind:], behind)
    return cache, took


def follow_singly(
    engine: TransformersEngine,
    cache: TwoEndedCache | RaggedCache,
    token_ids: Sequence[int],
    start: int,
    steps: Iterable[int],
) -> tuple[torch.Tensor, float]:
    """Go on over a cache by given tokens, some at a time.

    Parameters
    ----------
    engine : TransformersEngine
        Whose cache it is.
    cache : TwoEndedCache or RaggedCache
        Covers the positions below `start`.
    token_ids : sequence of int
        What is fed.
    start : int
        The position of the first.
    steps : iterable of int
        How many at once, one after the other.

    Returns
    -------
    Tensor
        (tokens, vocabulary): the logits behind each token, float32.
    float
        Seconds per token: the median of the first `_SINGLY` steps.
    """
    logits, took, at = [], [], 0
    for count in steps:
        began = perf_counter()
        logits.append(engine.logits(cache, token_ids[at : at + count], start + at))
        took.append((perf_counter() - began) / count)
        at += count
    return torch.cat(logits), median(took[:_SINGLY])


def _steps(tokens: int, stride: int | None) -> list[int]:
    """How many tokens are fed at once, one after the other."""
    if stride is None:
        singly = min(_SINGLY, tokens)
        return [1] * singly + [tokens - singly] * (tokens > singly)
    return [min(stride, tokens - at) for at in range(0, tokens, stride)]


def _parts(document: Document, question_first: bool) -> list[_Part]:
    context, continuation = document.context, document.continuation
    if len(continuation) < 2:
        raise BadInput("a continuation of 2 tokens or more is needed: the first one is predicted by the prompt")
    if question_first and not document.needles:
        raise BadInput("the question comes first, but there is no needle to ask for")
    if not question_first:
        needles, at = [], len(continuation)
        for needle in document.needles:
            at += len(needle.question)
            needles.append(range(at, at := at + len(needle.answer)))
        return [_Part(context, document.tail, [], len(continuation) - 1, needles)]
    parts = []
    for needle in document.needles:
        prompt = [*context, *needle.question]
        marked = [Marked(len(context), len(prompt), "question")]
        # a token more, so that there is a step even behind an answer of one token
        parts.append(
            _Part(prompt, [*needle.answer, needle.answer[-1]], marked, len(needle.answer), [range(len(needle.answer))])
        )
    return parts


def _said(part: _Part, reference: Reference, logits: torch.Tensor) -> _Said:
    """What a model says behind each token of the tail but the last.

    The prompt's own prediction, of the first token of the tail, is not among them. Where the question comes first, that
    is the beginning of the answer, and it is given.
    """
    likely = torch.log_softmax(logits, -1)
    gold = torch.tensor(part.tail[1:])
    own = likely.gather(1, gold[:, None])[:, 0]
    right = likely.argmax(-1) == gold
    spans = [slice(max(0, one.start - 1), one.stop - 1) for one in part.needles]
    kl, agreement, _ = reference.compare(logits)
    return _Said(
        (kl, agreement, -float(own[: part.predicted].mean())),
        [bool(right[span].all()) for span in spans],
        sum(float(own[span].sum()) for span in spans),
        sum(span.stop - span.start for span in spans),
    )


def _total(kind: str, ones: Sequence[_Said], asked: Sequence[bool], sizes: tuple[float, int, float, float]) -> Measured:
    found = [one for said in ones for one in said.found]
    tokens = sum(one.gold_tokens for one in ones)
    nats = sum(one.gold_nats for one in ones) / max(tokens, 1)
    both = sum(mine and known for mine, known in zip(found, asked, strict=True))
    kl, agreement, own = (fmean(column) for column in zip(*(one.compared for one in ones), strict=True))
    return Measured(kind, kl, agreement, own, sum(asked), both, nats, *sizes)


def summary(name: str, option: str | None, fingerprint: str | None, ones: Sequence[Measured]) -> dict[str, Any]:
    """A method's or sight's figures with 95 % intervals over documents, and each document's.

    Figures are the means of those of `Measured`; `retrieval` is the share of needles found, of those that the full
    cache finds, or None if it finds none.
    """
    columns = {
        field.name: [(float(getattr(one, field.name)), 1.0) for one in ones]
        for field in fields(Measured)
        if field.name not in ("kind", "asked", "found")
    }
    columns["retrieval"] = [(one.found / max(one.asked, 1), float(one.asked)) for one in ones]
    return {
        "name": name,
        "option": option,
        "fingerprint": fingerprint,
        **figures_of(columns),
        "needles_asked": sum(one.asked for one in ones),
        "documents": [asdict(one) for one in ones],
    }


class CompressResults:
    """What was measured so far, of all methods and sights on the same documents.

    Parameters
    ----------
    run : mapping
        What `describe_run` says.
    settings : mapping
        `model`, `dtype`, and of the documents: `documents`, `tokens`, `continuation`; `questions`: "first" or "last";
        `chunk_tokens`, 64 if it is not there.
    ways : mapping of str to str
        What is to be judged: by recipe, the option that it is for.
    """

    def __init__(self, run: Mapping[str, Any], settings: Mapping[str, Any], ways: Mapping[str, str]) -> None:
        self.run, self.settings = dict(run), _CHUNKS | dict(settings)
        self._options = dict(ways)
        self.ways = {recipe: _way_or_map(option, recipe) for recipe, option in ways.items()}
        self.judged: dict[str, list[Measured]] = {name: [] for name in (EXACT, *ways)}

    @property
    def is_complete(self) -> bool:
        """Whether all were judged on all documents."""
        return not self.lacks(self.settings["documents"] - 1)

    def lacks(self, number: int) -> bool:
        """Whether there is something to judge on a document."""
        return any(len(ones) <= number for ones in self.judged.values())

    def read(self, file: Path, *within: str) -> None:
        """Keep what a file of results has, but for what has changed since it was judged.

        Parameters
        ----------
        file : Path
            As `cakekv quality --compress --json` writes it.
        within : str
            Names that lead to the results, if they are not at the top of it.

        Raises
        ------
        BadInput
            It is no such file, or was measured with other settings or more documents.
        """
        try:
            data = json.loads(file.read_text())
            for name in within:
                data = data[name]
            before, methods = _CHUNKS | data["settings"], list(data["methods"])
            judged = {one["name"]: [Measured(**document) for document in one["documents"]] for one in methods}
            said = {one["name"]: (one["option"], one["fingerprint"]) for one in methods if one["name"] != EXACT}
            exact, command = judged[EXACT], went_on(data, self.run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"cannot add to {file}: it is no file that `cakekv quality --compress --json` wrote ({error!r})"
            ) from error
        check_settings(file, before, self.settings, _SAME)
        if len(exact) > self.settings["documents"]:
            raise BadInput(f"cannot add to {file}: it has {len(exact)} documents, so that as many have to be judged")
        for recipe, (option, fingerprint) in said.items():
            way = self.ways[recipe] = _way_or_map(option, recipe)
            self._options[recipe] = option
            if fingerprint != _fingerprint(way):
                judged[recipe] = []
        self.run["command"] = command
        self.judged = judged | {name: [] for name in self.judged if name not in judged}

    def judge(
        self, engine: TransformersEngine, number: int, document: Document, exact: TwoEndedCache | None = None
    ) -> None:
        """Judge on a document what was not yet; documents come in their order.

        Raises
        ------
        BadInput
            Results that are added to cannot be of this document: what the full cache answers differs.
        """
        missing = [name for name, ones in self.judged.items() if len(ones) <= number]
        if not missing:
            return
        ways = {name: self.ways[name] for name in missing if name != EXACT}
        first, chunk_tokens = self.settings["questions"] == "first", self.settings["chunk_tokens"]
        new = judge(engine, document, ways, question_first=first, exact=exact, chunk_tokens=chunk_tokens)
        if EXACT not in missing and not _is_same(self.judged[EXACT][number], new[EXACT]):
            raise BadInput("cannot add to the file: its documents are not those that are judged now")
        for name in missing:
            self.judged[name].append(new[name])

    def figures(self) -> dict[str, dict[str, Any]]:
        """The `summary` of each, by name."""
        return {
            name: summary(name, self._options.get(name), _fingerprint(self.ways.get(name)), ones)
            for name, ones in self.judged.items()
            if ones
        }

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the file."""
        ways = {name: ones for name, ones in self.judged.items() if ones and name != EXACT}
        return {
            **self.run,
            "settings": self.settings,
            "methods": list(self.figures().values()),
            "paired": paired(ways),
        }


def _fingerprint(way: Way | None) -> str | None:
    """What decides what a method keeps; of a sight, its parameters; of a map of layers, its digest."""
    if isinstance(way, LayerMap):
        return way.digest
    return way.fingerprint if isinstance(way, Method) else None if way is None else way.recipe


def _is_same(before: Measured, now: Measured) -> bool:
    return (before.kind, before.asked) == (now.kind, now.asked) and abs(before.nats - now.nats) < 1e-2
