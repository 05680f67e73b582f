"""The judge: runs a document over the exact cache and over a codec's, and compares the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from cakekv.bench.quality.documents import Document
from cakekv.bench.quality.intervals import figures_of, number
from cakekv.chunk import seal, segments
from cakekv.codec.base import Codec
from cakekv.codec.coder import ChunkCoder
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey
from cakekv.load.decoding import decoded

_SPAN = 512
_KEY = ChunkKey(bytes(ChunkKey.LENGTH))


@dataclass
class Judgement:
    """One document, one recipe.

    Attributes
    ----------
    kind : str
        The document's.
    kl : float
        Mean Kullback-Leibler divergence of the next-token distribution from the exact cache's, in nats.
    agreement : float
        Share of the positions at which the likeliest token is the same.
    asked, found : int
        Needles that the exact cache answers, and those of them that the codec's answers, too.
    stored_bytes, coded_bytes, exact_bytes : int
        Of the document's chunks: as stored, with those in the exact form; those in the coded form alone; all if they
        were exact.
    tokens, coded_tokens : int
        In all of the chunks, and in those in the coded form.
    encode_gbps, decode_gbps : float
        Gigabytes of the exact cache per second, on one thread: the median over coded chunks.
    """

    kind: str
    kl: float
    agreement: float
    asked: int
    found: int
    stored_bytes: int
    coded_bytes: int
    exact_bytes: int
    tokens: int
    coded_tokens: int
    encode_gbps: float
    decode_gbps: float


class Stored(NamedTuple):
    """As in `Judgement`."""

    stored_bytes: int
    coded_bytes: int
    exact_bytes: int
    tokens: int
    coded_tokens: int
    encode_gbps: float
    decode_gbps: float


class Compared(NamedTuple):
    """How a codec's model differs from the exact cache's: see `Reference.compare`."""

    kl: float
    agreement: float
    likeliest: torch.Tensor


class Reference:
    """What the model says over the exact cache, worked out once for all codecs.

    Parameters
    ----------
    logits : Tensor
        As from `follow`: (tokens, vocabulary).
    predicted : int or None
        So many of the tokens, from the first on, are compared; None: all.
    """

    def __init__(self, logits: torch.Tensor, predicted: int | None = None) -> None:
        self.likeliest = logits.argmax(-1)
        self._expected = torch.log_softmax(logits[:predicted], -1)
        self._shares = self._expected.exp()

    def compare(self, logits: torch.Tensor) -> Compared:
        """Mean KL divergence from the exact distributions, in nats, and the share with the same likeliest token.

        Parameters
        ----------
        logits : Tensor
            Over another cache: (tokens, vocabulary).

        Returns
        -------
        Compared
            With the likeliest token behind each token: (tokens,).
        """
        predicted, likeliest = len(self._expected), logits.argmax(-1)
        kl = (self._shares * (self._expected - torch.log_softmax(logits[:predicted], -1))).sum(-1)
        same = self.likeliest[:predicted] == likeliest[:predicted]
        return Compared(float(kl.mean()), float(same.float().mean()), likeliest)


class Judge:
    """Judges codecs on one model.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    chunk_tokens : int
        Tokens per chunk.
    """

    def __init__(self, engine: TransformersEngine, chunk_tokens: int = 64) -> None:
        self._engine = engine
        self._chunk_tokens = chunk_tokens
        self._dtype = engine.identity(chunk_tokens).dtype
        self._coders: dict[Codec, ChunkCoder] = {}

    def judge(self, document: Document, codecs: Sequence[Codec], computed: Sequence[float] = (0.0,)) -> list[Judgement]:
        """Judge codecs on a document, whose context is computed once for all.

        Parameters
        ----------
        document : Document
            What is read and what is asked.
        codecs : sequence of Codec
            What chunks are encoded with.
        computed : sequence of float
            Shares of the context, from its front, that are computed; the rest is loaded. 0: all is loaded.

        Returns
        -------
        list of Judgement
            Every codec at the first share, then every codec at the next.
        """
        for share in computed:
            if not 0.0 <= share < 1.0:
                raise BadInput(f"the computed share is from 0 to below 1, not {share}")
        engine, context = self._engine, document.context
        capacity = len(context) + len(document.tail)
        exact = engine.new_cache(capacity)
        drops = any(codec.drops for codec in codecs)
        cache = engine.new_sparse_cache(capacity) if drops else engine.new_cache(capacity)
        for start in range(0, len(context), _SPAN):
            engine.compute(exact, context[start : start + _SPAN], start)
        reference = Reference(follow(engine, exact, document), len(document.continuation))
        return [
            self._one(document, codec, share, exact, cache, reference) for share, codec in product(computed, codecs)
        ]

    def _one(
        self,
        document: Document,
        codec: Codec,
        computed: float,
        exact: TwoEndedCache,
        cache: TwoEndedCache,
        reference: Reference,
    ) -> Judgement:
        end = len(document.context)
        cache.forget_absent()
        for theirs, ours in zip(exact.stored, cache.stored, strict=True):
            for source, target in zip(theirs.regions, ours.regions, strict=True):
                target[:, :end] = source[:, :end]
        stored = self.transcode(cache, int(computed * end) // self._chunk_tokens * self._chunk_tokens, end, codec)
        kl, agreement, likeliest = reference.compare(follow(self._engine, cache, document))
        asked = answers(document, reference.likeliest)
        found = [one for one, known in zip(answers(document, likeliest), asked, strict=True) if known]
        return Judgement(document.kind, kl, agreement, len(found), sum(found), *stored)

    def _coder(self, codec: Codec) -> ChunkCoder:
        """Made and compiled once per codec."""
        if codec not in self._coders:
            coder = ChunkCoder(codec, self._engine.layout, self._chunk_tokens, self._dtype, self._engine.rotations)
            coder.warm_up()
            self._coders[codec] = coder
        return self._coders[codec]

    def transcode(self, cache: TwoEndedCache, first: int, end: int, codec: Codec) -> Stored:
        """Encode and decode the context's chunks from `first` on in place, as saving and loading them would."""
        engine, tokens, coder = self._engine, self._chunk_tokens, self._coder(codec)
        decoder = engine.decoder(coder)
        stored = coded = coded_tokens = count = 0
        speeds = []
        source, room, target = (engine.staging(coder.exact.total_bytes) for _ in range(3))
        for start in range(first, end - tokens + 1, tokens):
            engine.gather(cache, start, tokens, segments(coder.exact, source))
            count += 1
            began = perf_counter()
            recent = start + tokens > end - codec.window
            chunk = None if recent else coder.encode(source, room, _KEY, start)
            if chunk is None:
                seal(coder.exact, source, _KEY, start)
                stored += coder.exact.total_bytes
                continue
            encoded = perf_counter()
            parts = decoded(coder, chunk, target, decoder)
            size = sum(coder.exact.segment_bytes) / 1e9
            speeds.append((size / (encoded - began), size / (perf_counter() - encoded)))
            engine.place(cache, start, tokens, parts)
            stored += len(chunk)
            coded += len(chunk)
            coded_tokens += tokens
        if not count:
            raise BadInput(f"nothing of {end} tokens is loaded in chunks of {tokens}: judge longer documents")
        encode, decode = (median(column) for column in zip(*speeds, strict=True)) if speeds else (math.nan, math.nan)
        return Stored(stored, coded, count * coder.exact.total_bytes, count * tokens, coded_tokens, encode, decode)


def follow(engine: TransformersEngine, cache: TwoEndedCache, document: Document) -> torch.Tensor:
    """Logits that predict each token of the document's tail: (tokens, vocabulary).

    The context's last token is computed anew, over what the cache holds before it; the cache stays as it was there.
    """
    start = len(document.context)
    kept = [[region[:, start - 1 : start].clone() for region in layer.regions] for layer in cache.stored]
    cache.set_length(start - 1)
    with torch.inference_mode(), engine.attending(cache) as model:
        output = engine.forward_of(model, cache, [document.context[-1], *document.tail[:-1]])
        logits: torch.Tensor = output.logits[0].to("cpu", torch.float32)
    for layer, regions in zip(cache.stored, kept, strict=True):
        for region, one in zip(layer.regions, regions, strict=True):
            region[:, start - 1 : start] = one
    return logits


def answers(document: Document, said: torch.Tensor) -> list[bool]:
    """Which needles are found by a model that says so behind each token of the tail."""
    found, at = [], len(document.continuation)
    for needle in document.needles:
        at += len(needle.question)
        found.append(said[at : at + len(needle.answer)].tolist() == list(needle.answer))
        at += len(needle.answer)
    return found


def summary(recipe: str, codec: Codec, judgements: Sequence[Judgement], computed: float = 0.0) -> dict[str, Any]:
    """A recipe's figures over all documents, with 95 % intervals, and each document's; NaN becomes None."""
    ones = list(judgements)
    columns: dict[str, list[tuple[float, float]]] = {
        "agreement": [(one.agreement, 1.0) for one in ones],
        "kl": [(one.kl, 1.0) for one in ones],
        "retrieval": [(one.found / one.asked if one.asked else 0.0, float(one.asked)) for one in ones],
        "bytes_per_token": [(one.stored_bytes / one.tokens, 1.0) for one in ones],
        "ratio": [(one.exact_bytes / one.stored_bytes, 1.0) for one in ones],
    }
    coded = [one for one in ones if one.coded_tokens]
    if coded:
        columns["coded_ratio"] = [
            (one.exact_bytes / one.tokens * one.coded_tokens / one.coded_bytes, 1.0) for one in coded
        ]
        columns["encode_gbps"] = [(one.encode_gbps, 1.0) for one in coded]
        columns["decode_gbps"] = [(one.decode_gbps, 1.0) for one in coded]
    figures: dict[str, Any] = {"recipe": recipe, "computed": computed, "fingerprint": codec.fingerprint}
    figures |= dict.fromkeys(("coded_ratio", "encode_gbps", "decode_gbps"))
    figures |= figures_of(columns)
    figures["needles_asked"] = sum(one.asked for one in ones)
    figures["documents"] = [{name: number(value) for name, value in asdict(one).items()} for one in ones]
    return figures


class Judged(Protocol):
    """What is compared of two judgements; see `Judgement`."""

    @property
    def kl(self) -> float: ...
    @property
    def agreement(self) -> float: ...
    @property
    def asked(self) -> int: ...
    @property
    def found(self) -> int: ...


def paired(judged: Mapping[str, Sequence[Judged]]) -> list[dict[str, Any]]:
    """How recipes differ on the same documents: for every two of them, the first less the second.

    Parameters
    ----------
    judged : mapping of str to sequence of Judgement
        By recipe; the same documents, in the same order. Those that not all have count for nothing.

    Returns
    -------
    list of dict
        `a`, `b`, the differences `kl`, `agreement` and `retrieval`, `kl_ratio` (of `a`'s mean to `b`'s), and their 95 %
        `intervals`.
    """
    pairs = []
    for (a, ones), (b, others) in combinations(judged.items(), 2):
        both = list(zip(ones, others, strict=False))
        columns = {
            "kl": [(x.kl - y.kl, 1.0) for x, y in both],
            "kl_ratio": [(x.kl / y.kl if y.kl else 0.0, y.kl) for x, y in both],
            "agreement": [(x.agreement - y.agreement, 1.0) for x, y in both],
            "retrieval": [((x.found - y.found) / max(x.asked, 1), float(x.asked)) for x, y in both],
        }
        pairs.append({"a": a, "b": b, **figures_of(columns)})
    return pairs
