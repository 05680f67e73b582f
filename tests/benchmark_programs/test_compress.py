"""The benchmarks of methods that keep fewer tokens, at the smallest size: what they write is what happened."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import compress, decode_steps
from cakekv.bench.quality.compress import Measured, way_named
from cakekv.bench.quality.compress_picture import compress_picture
from cakekv.bench.quality.documents import Document, Needle
from cakekv.engine.transformers import TransformersEngine

CONTINUATION = list(range(10))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=1024,
    )
    return TransformersEngine(LlamaForCausalLM(config))


def documents(tokens: int) -> list[Document]:
    chance = random.Random(2)
    needles = [Needle((8, 9), (4, 30)), Needle((11,), (5,))]
    return [Document("text", [chance.randrange(50) for _ in range(tokens)], CONTINUATION, needles) for _ in range(2)]


def test_studies_go_on_and_claims_are_made_of_them(engine: TransformersEngine, tmp_path: Path) -> None:
    file = tmp_path / "compress.json"
    sizes = {compress.SHORT: 90, compress.ASKED: 90, compress.LONG: 600}
    short = ("dbudgetkv", "corm", "vl_cache", "kvmerger:share=0.5", "kvmerger:share=0.5,merging=no")
    for study, ways in ((compress.SHORT, short), *list(compress.WAYS.items())[1:]):
        settings = {"model": "tiny", "dtype": "float32", "documents": 2, "continuation": 10, "tokens": sizes[study]}
        settings["questions"] = "first" if study == compress.ASKED else "last"
        made = documents(sizes[study])
        for part in (ways[:2], ways):  # it goes on with the others
            compress.run_study(engine, study, made, dict.fromkeys(part, "compress"), settings, file)
    data = json.loads(file.read_text())
    assert list(data["studies"]) == list(sizes)
    assert [one["name"] for one in data["methods"]][:6] == ["exact", *short]
    assert all(one["documents"] == 2 for one in data["methods"])
    found = {(one["method"], one["claim"].partition(":")[0]): one for one in data["claims"]}
    falls = found["corm", "the share that is kept falls with length"]
    kept = [one["corm_kept"] for one in data["studies"][compress.LONG]["beside"]]
    assert [list(one) for one in kept] == [["256", "512"]] * 2
    assert falls["measured"] == pytest.approx(sum(one["512"] for one in kept) / sum(one["256"] for one in kept))
    assert falls["holds"] == (falls["measured"] < 1)
    by_name = {one["name"]: one for one in data["studies"][compress.SHORT]["methods"]}
    removed = found["kvmerger:share=0.5", "merging removes at least 10 % of the KL of dropping the same tokens"]
    merged, dropped = (by_name[f"kvmerger:share=0.5{more}"]["kl"] for more in ("", ",merging=no"))
    assert removed["measured"] == pytest.approx(1 - merged / dropped)
    assert removed["holds"] == (removed["measured"] >= 0.1)
    equal = [Measured(**one["top_k"]) for one in data["studies"][compress.SHORT]["beside"]]
    assert [one.kept for one in equal] == pytest.approx(
        [one["kept"] for one in by_name["corm"]["documents"]], abs=0.02
    )  # whole tokens
    assert all(one["holds"] is not None for one in data["methods"] if one["name"] == "dbudgetkv")
    compress_picture(data["studies"], tmp_path / "compress.png")
    assert (tmp_path / "compress.png").stat().st_size > 10_000

    before = file.read_text()
    compress.run_study(engine, study, made, dict.fromkeys(ways, "compress"), settings, file)
    assert file.read_text() == before  # nothing was left to measure


def test_claims_hold_or_fail_by_what_was_measured() -> None:
    def study(**ways: list[Measured]) -> dict[str, Any]:
        methods = [
            {"name": way.replace("__", ":"), "documents": [vars(one) for one in ones]} for way, ones in ways.items()
        ]
        return {"methods": methods, "beside": []}

    def one(kl: float, agreement: float, kept: float, found: int, nats: float) -> Measured:
        return Measured("text", kl, agreement, nats, 2, found, -1.0, kept, 100, 0.1, 0.1)

    same = [one(0.1, 0.98, 0.5, 1, 2.0), one(0.1, 0.96, 0.5, 2, 2.0)]
    varied = [one(0.1, 0.96, 0.5, 1, 2.0), one(0.1, 0.96, 0.9, 2, 2.0)]
    found = [claim.holds for claim in compress.dbudgetkv_claims({"short": study(dbudgetkv=same)})]
    assert found == [False, True]
    measured = compress.dbudgetkv_claims({"short": study(dbudgetkv=varied * 10)})
    assert [claim.holds for claim in measured] == [True, False]
    assert measured[0].measured == pytest.approx(0.2 / 0.7)
    window = [one(0.2, 0.9, 0.1, 0, 2.1), one(0.2, 0.9, 0.1, 0, 2.0)]
    streams = {
        "long": {
            "methods": [
                {"name": name, "documents": [vars(each) for each in ones]}
                for name, ones in zip(compress.WAYS["long"], (same, window), strict=True)
            ],
            "beside": [],
        }
    }
    passkeys, perplexity = compress.cascading_claims(streams)
    assert (passkeys.measured, passkeys.holds) == (0.75, True)
    assert (perplexity.measured < 0, perplexity.holds) == (True, True)


def test_steps_are_timed_over_what_is_left(engine: TransformersEngine) -> None:
    ways = {"sink_recent": way_named("compress", "sink_recent"), "whole": way_named("decode", "whole")}
    found = decode_steps.measure(engine, documents(100)[0].context, CONTINUATION, ways, 16)
    exact, fewer, whole = found["ways"]
    assert [one["name"] for one in found["ways"]] == ["exact", "sink_recent", "whole"]
    assert fewer["cache_bytes"] * 5 == exact["cache_bytes"] == whole["cache_bytes"]
    assert (exact["kept"], fewer["kept"], whole["kept"]) == (1, 0.2, 1)
    assert all(one["token_s"] > 0 for one in found["ways"])
    assert found["tap_share"] == found["tap_s"] / found["prefill_s"] > 0
