"""The judge: raw is exact, worse codecs are judged worse, and the figures are what they say."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from cakekv.bench.quality.documents import KINDS, Document, Needle, make_documents
from cakekv.bench.quality.intervals import interval
from cakekv.bench.quality.judge import Judge, Judgement, paired, summary
from cakekv.codec import codec_named
from cakekv.codec.rows import Rows
from cakekv.compress.key_norm import KeyNorm
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput


@pytest.fixture(scope="module")
def engine(make_engine: Callable[[str], TransformersEngine]) -> TransformersEngine:
    return make_engine("bfloat16")


@pytest.fixture(scope="module")
def documents(engine: TransformersEngine) -> list[Document]:
    """Random tokens; the needles are what the model says anyway, and what it does not."""
    rng = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(211) for _ in range(count)]

    made = []
    for _ in range(3):
        document = Document("text", tokens(300), tokens(40), [])
        for wrong in (0, 1):
            question = tokens(6)
            asked = [*document.context, *document.tail, *question]
            answer = int(engine.compute(engine.new_cache(len(asked)), asked, 0).argmax())
            document.needles.append(Needle(tuple(question), ((answer + wrong) % 211,)))
        made.append(document)
    return made


def judgements(engine: TransformersEngine, documents: list[Document], recipes: list[str]) -> dict[str, list[Judgement]]:
    judge = Judge(engine, 32)
    codecs = [codec_named(recipe) for recipe in recipes]
    columns = zip(*(judge.judge(document, codecs) for document in documents), strict=True)
    return {recipe: list(ones) for recipe, ones in zip(recipes, columns, strict=True)}


def judged(engine: TransformersEngine, documents: list[Document], recipes: list[str]) -> dict[str, Any]:
    ones = judgements(engine, documents, recipes)
    return {recipe: summary(recipe, codec_named(recipe), ones[recipe]) for recipe in recipes}


def test_worse_codecs_are_judged_worse(engine: TransformersEngine, documents: list[Document]) -> None:
    figures = judged(engine, documents, ["raw", "int8", "int4", "kivi:window=0", "kivi:window=128"])
    assert figures["raw"]["kl"] == 0
    assert figures["raw"]["agreement"] == figures["raw"]["retrieval"] == figures["raw"]["ratio"] == 1
    assert figures["raw"]["encode_gbps"] is None
    assert 0 < figures["int8"]["kl"] < figures["int4"]["kl"] < figures["kivi:window=0"]["kl"]
    assert figures["kivi:window=128"]["kl"] < figures["kivi:window=0"]["kl"]
    assert 1 < figures["int8"]["ratio"] < figures["int4"]["ratio"] <= figures["kivi:window=0"]["ratio"]
    assert figures["kivi:window=128"]["ratio"] < figures["kivi:window=0"]["ratio"]
    for one in figures.values():
        assert one["needles_asked"] == 3  # of six: the exact cache answers one of two
        low, high = one["intervals"]["kl"]
        assert low <= one["kl"] <= high


def test_a_computed_front_helps(engine: TransformersEngine, documents: list[Document]) -> None:
    codecs = [codec_named("kivi:window=0"), codec_named("raw")]
    kivi, raw, kivi_half, raw_half = Judge(engine, 32).judge(documents[0], codecs, [0.0, 0.8])
    assert 0 < kivi_half.kl < kivi.kl
    assert raw.kl == raw_half.kl == 0
    assert (kivi.tokens, kivi_half.tokens) == (288, 64)
    with pytest.raises(BadInput, match="share"):
        Judge(engine, 32).judge(documents[0], codecs, [1.0])


def test_bytes_are_those_of_the_store(engine: TransformersEngine, documents: list[Document]) -> None:
    one = judged(engine, documents[:1], ["int8:window=64"])["int8:window=64"]
    document = one["documents"][0]
    assert document["tokens"] == 288
    assert document["coded_tokens"] == 7 * 32  # 236 tokens are older than the newest 64
    assert one["bytes_per_token"] == document["stored_bytes"] / 288
    assert one["ratio"] == document["exact_bytes"] / document["stored_bytes"]


def test_rows_that_are_not_stored_are_not_there_for_the_judge(
    engine: TransformersEngine, documents: list[Document]
) -> None:
    codecs = [Rows(method=KeyNorm(share), inner=codec_named("raw")) for share in (0.25, 0.75, 1.0)]
    few, most, every = Judge(engine, 32).judge(documents[0], codecs)
    assert every.kl < 1e-5 < most.kl < few.kl
    assert few.stored_bytes < 0.6 * most.stored_bytes
    assert every.agreement == 1.0


def test_differences_are_of_the_same_documents(engine: TransformersEngine, documents: list[Document]) -> None:
    ones = judgements(engine, documents, ["raw", "kivi:window=0", "kivi:window=0,keys=token"])
    pairs = paired(ones)
    assert [(pair["a"], pair["b"]) for pair in pairs] == list(combinations(ones, 2))
    for pair in pairs:
        first, second = ([one.kl for one in ones[pair[name]]] for name in "ab")
        assert pair["kl"] == pytest.approx((sum(first) - sum(second)) / 3)
        assert pair["kl_ratio"] == pytest.approx(sum(first) / sum(second))
        each = [x - y for x, y in zip(first, second, strict=True)]
        assert pair["intervals"]["kl"] == pytest.approx([min(each), max(each)])  # of three documents 1 draw in 27


class Words:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 211 for letter in text]}


def test_documents_are_the_same_every_time() -> None:
    first, second = (make_documents(Words(), 6, 600, 50) for _ in range(2))
    assert first == second
    assert [document.kind for document in first] == [*KINDS, *KINDS]
    assert len({tuple(document.context) for document in first}) == 6
    for document in first:
        assert len(document.context) == 600
        assert len(document.continuation) == 50
        assert len(document.needles) == 3
    with pytest.raises(BadInput, match="256"):
        make_documents(Words(), 1, 100, 10)


class WordsBehindBos(Words):
    """Puts a token first unless told otherwise, and one last."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        plain = super().__call__(text)["input_ids"]
        return {"input_ids": [300, *plain, 301] if add_special_tokens else plain}


def test_documents_begin_as_the_tokenizer_begins_texts() -> None:
    with_bos, without = (make_documents(tokenizer, 3, 600, 50) for tokenizer in (WordsBehindBos(), Words()))
    assert [document.needles for document in with_bos] == [document.needles for document in without]
    for document in with_bos:
        assert document.context[0] == 300
        assert {300, 301}.isdisjoint([*document.context[1:], *document.tail])
        assert len(document.context) == 600
        assert len(document.continuation) == 50


def test_intervals() -> None:
    assert interval([(2.0, 1.0)] * 5) == (2.0, 2.0, 2.0)
    mean, low, high = interval([(float(i), 1.0) for i in range(20)])
    assert mean == 9.5
    assert 5 < low < 9.5 < high < 14
    assert interval([(1.0, 1.0), (5.0, 0.0)])[0] == 1.0
    assert str(interval([(0.0, 0.0)])[0]) == "nan"
