"""Layers that attend to what another keeps: what they compute, what is stored of them, and which maps are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cakekv.cake import Cake
from cakekv.engine.sharing import Calibration, LayerMap, find_map, map_file, most_unlike_first, write_map
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.prompt import Document
from cakekv.store.memory import MemoryStore
from tests.matrix.models import build

PROMPT = [token * 7 % 90 + 5 for token in range(53)]
CHAIN = LayerMap(((1, 2), (0, 1)))


def test_a_chain_ends_at_a_layer_that_keeps_its_own() -> None:
    assert CHAIN.sources == {2: 0, 1: 0}
    assert LayerMap(((0, 1), (1, 2))).sources == {1: 0, 2: 0}
    assert LayerMap(((0, 1), (0, 2))).digest == CHAIN.digest != LayerMap(((0, 1),)).digest
    assert CHAIN.first(1).sources == {2: 1}


@pytest.mark.parametrize("share", [LayerMap(((0, 2),)), LayerMap(((1, 2),)), CHAIN])
def test_it_computes_what_projections_of_the_source_would(share: LayerMap) -> None:
    """Against a model without a cache, in which the projections of shared layers return what those of the source do."""
    model = build("llama")
    engine = TransformersEngine(model, share)
    cache = engine.new_cache(len(PROMPT))
    engine.compute(cache, PROMPT[:20], 0)
    engine.compute(cache, PROMPT[20:21], 20)
    found = engine.compute(cache, PROMPT[21:], 21)
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def noting(layer: int, name: str) -> Callable[..., Any]:
        def hook(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
            kept[layer, name] = output
            return kept[share.sources.get(layer, layer), name]

        return hook

    for number, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(noting(number, name))
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe", "phi", "bloom"])
def test_restored_answers_are_the_computed_ones(name: str) -> None:
    store = MemoryStore()
    plain, sharing = TransformersEngine(build(name)), TransformersEngine(build(name), LayerMap(((0, 2),)))
    with Cake(sharing, store=store, chunk_tokens=8) as cake:
        computed = cake.generate(PROMPT, max_new_tokens=6, mode="compute")
        cake.wait_saved()
        restored = cake.generate(PROMPT, max_new_tokens=6, mode="load")
        assert restored.report.loaded_tokens == 48
        assert restored.token_ids == computed.token_ids
    assert sharing.layout.token_bytes * 3 == plain.layout.token_bytes * 2
    with Cake(plain, store=store, chunk_tokens=8) as cake:  # neither finds the other's chunks
        assert cake.generate(PROMPT, max_new_tokens=1, save=False).report.loaded_tokens == 0
    with Cake(TransformersEngine(build(name), LayerMap(((1, 2),))), store=store, chunk_tokens=8) as cake:
        assert cake.generate(PROMPT, max_new_tokens=1, save=False).report.loaded_tokens == 0


def test_conversations_and_codecs_work_with_it() -> None:
    engine = TransformersEngine(build("llama"), CHAIN)
    with Cake(engine, store=MemoryStore(), chunk_tokens=8, codec="int8") as cake:
        first = cake.generate(PROMPT, max_new_tokens=12)
        cake.wait_saved()
        whole = [*PROMPT, *first.token_ids, 7, 8, 9]
        again = cake.generate(whole, max_new_tokens=4, mode="load")
        assert again.report.loaded_tokens >= 48
        assert again.token_ids == cake.generate(whole, max_new_tokens=4, mode="compute").token_ids


def test_documents_move_with_it() -> None:
    engine = TransformersEngine(build("llama"), LayerMap(((0, 2),)))
    assert len(engine.turnable()) == len(engine.layout.layers) == 2
    with Cake(engine, store=MemoryStore(), chunk_tokens=8, reuse="epic:link=4") as cake:
        document = Document(PROMPT[:32])
        cake.learn(document)
        cake.wait_saved()
        report = cake.prefill([PROMPT[40:50], document, [7]], mode="load").report
        assert report.reused_tokens == 28


def test_transformers_goes_on_with_it() -> None:
    engine = TransformersEngine(build("llama"), LayerMap(((0, 2),)))
    with Cake(engine) as cake:
        expected = cake.generate(PROMPT, max_new_tokens=5).token_ids
        prefill = cake.prefill(PROMPT)
        ids = torch.tensor([PROMPT, PROMPT])
        grown = prefill.dynamic_cache()
        grown.crop(-1)
        answer = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=grown, max_new_tokens=5, do_sample=False
        )
    assert answer[:, len(PROMPT) :].tolist() == [expected, expected]


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("llama", LayerMap(((0, 3),)), "of another model"),
        ("qwen2-mixed", LayerMap(((0, 1),)), "has a window"),
        ("qwen2-mixed", LayerMap(((0, 2),)), "cannot attend"),
        ("gemma3n", LayerMap(((0, 4),)), "cannot attend"),
    ],
)
def test_maps_that_a_model_cannot_have_are_refused(name: str, share: LayerMap, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        TransformersEngine(build(name), share)


@pytest.mark.parametrize("pairs", [((2, 0),), ((1, 1),), ((0, 2), (1, 2)), ((-1, 2),)])
def test_what_is_no_map_is_refused(pairs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(BadInput, match="an earlier and a later layer"):
        LayerMap(pairs)


@pytest.mark.parametrize("option", [{"compress": "sink_recent"}, {"decode": "whole"}, {"reuse": "blend"}])
def test_what_it_cannot_be_combined_with(option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="share another's keys and values"):
        Cake(TransformersEngine(build("llama"), CHAIN), **option)


def test_the_least_alike_come_first() -> None:
    engine = TransformersEngine(build("llama"))
    texts = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(1)).tolist()
    seen = Calibration(engine, texts)
    distances = seen.distances()
    keys = []
    for layer in range(3):  # plain code
        planes = []
        for text in texts:
            cache = engine.new_cache(24)
            engine.compute(cache, text, 0)
            planes.append([cache.stored[layer].plane(number)[0] for number in (0, 1)])
        keys.append([torch.stack([one[number] for one in planes]).mean(0) for number in (0, 1)])
    for (one, other), distance in distances.items():
        apart = [
            [float((keys[one][n][head, at] - keys[other][n][head, at]).norm()) for head in range(2) for at in range(24)]
            for n in (0, 1)
        ]
        assert distance == pytest.approx(sum(map(sum, apart)) / (2 * 2 * 24), rel=1e-4)
    ranked = most_unlike_first(distances)
    assert [distances[pair] for pair in ranked] == sorted(distances.values(), reverse=True)
    tried: list[tuple[int, int]] = []
    chosen = seen.choose(ranked, 1, lambda pair, cosine: tried.append(pair))
    assert chosen.pairs == (tried[-1],)
    assert seen.cosine(chosen) > 0.5
    assert seen.cosine(LayerMap(())) == pytest.approx(1.0)


def test_a_kept_map_is_found_by_its_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKEKV_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="cakekv share calibrate"):
        find_map(1, ["this"])
    write_map(CHAIN.to_bytes(["this"]), [map_file("this"), map_file("that")])
    assert find_map("1", ["this"]) == CHAIN.first(1)
    assert find_map(map_file("this"), ["other", "this"]) == CHAIN
    for wrong, reason in ((3, "has 1 to 2 layers"), (0, "has 1 to 2 layers"), (tmp_path / "none", "no file")):
        with pytest.raises(BadInput, match=reason):
            find_map(wrong, ["this"])
    with pytest.raises(BadInput, match="of another model"):
        find_map(1, ["that"])
    for data, reason in (
        (b"", "it is none"),
        (json.dumps({"cakekv": "share", "version": 2}).encode(), "another version"),
        (CHAIN.to_bytes(["this"]).replace(b"[1, 2]", b"[1, true]"), "no pair of layers"),
        (CHAIN.to_bytes(["this"]).replace(b"[1, 2]", b"[2, 1]"), "an earlier and a later layer"),
    ):
        map_file("this").write_bytes(data)
        with pytest.raises(BadInput, match=reason):
            find_map(1, ["this"])
