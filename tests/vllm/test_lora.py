"""Adapters: chunks of one are never another's, and each is restored exactly."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_engine import TinyEngine, closing, prompt, sampling, scripted


def save_adapter(folder: Path, seed: int) -> Path:
    """A small adapter with random weights, in the form that PEFT writes."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    outputs = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    tensors = {}
    for layer in range(3):
        for module, size in outputs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 128, generator=random)
            tensors[f"{name}.lora_B.weight"] = torch.randn(size, 8, generator=random) / 10
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(outputs)}))
    return folder


def test_every_adapter_has_chunks_of_its_own(model: Path, plain: dict[int, list[int]], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    adapters = [
        None,
        *(
            LoRARequest(name, number, str(save_adapter(tmp_path / name, number)))
            for number, name in ((1, "a"), (2, "b"))
        ),
    ]
    store = scripted("adapters")
    options = {"store": "scripted://adapters", "mode": "load"}
    with closing(TinyEngine(model, options, enable_lora=True, max_loras=2, max_lora_rank=8)) as engine:

        def answer(adapter: LoRARequest | None) -> list[int]:
            return engine.run(prompt(1000), lora_request=adapter)

        computed = []
        for count, adapter in enumerate(adapters, 1):
            computed.append(answer(adapter))
            engine.settle()
            assert len(list(store)) == 7 * count
        assert not engine.half.outcomes.latest, "nobody's chunks were taken for another's"
        assert computed[0] == plain[1000]
        assert len({tuple(tokens) for tokens in computed}) == 3
        for adapter, expected in zip(adapters, computed, strict=True):
            engine.core.reset_prefix_cache()
            assert answer(adapter) == expected
            engine.settle()
            assert engine.report().loaded_tokens == 896
        # What was in the files when they were read is what keys name; who overwrites them gets nothing, and is told.
        (tmp_path / "a" / "adapter_config.json").write_text("{}")
        before = len(engine.half.outcomes.latest)
        engine.core.reset_prefix_cache()
        assert answer(adapters[1]) == computed[1]
        engine.settle()
        assert len(engine.half.outcomes.latest) == before
        assert len(list(store)) == 7 * 3
        engine.assert_nothing_leaked()


def test_an_adapter_is_its_weights_and_how_they_are_used(tmp_path: Path) -> None:
    from cakekv.vllm.scheduling.identity import _adapter

    folder = save_adapter(tmp_path / "a", 1)
    first = _adapter(folder)
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert _adapter(folder) != first


def test_more_adapters_than_vllm_has_room_for(model: Path, tmp_path: Path) -> None:
    """A restore with one adapter takes the steps of a prefill with another, which keeps its place meanwhile."""
    from vllm.lora.request import LoRARequest

    a, b = (
        LoRARequest(name, number, str(save_adapter(tmp_path / name, number))) for number, name in ((1, "a"), (2, "b"))
    )
    requests = [(prompt(2000), b), (prompt(2500, seed=4), a), (prompt(300, seed=5), b)]
    setup = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}

    def add(engine: TinyEngine, tokens: list[int], adapter: LoRARequest) -> str:
        return engine.add(tokens, lora_request=adapter)

    with closing(TinyEngine(model, **setup)) as engine:
        expected = [engine.finish(add(engine, *request))[0] for request in requests]
    store = scripted("more adapters")
    with closing(TinyEngine(model, {"store": "scripted://more adapters", "mode": "load"}, **setup)) as engine:
        engine.finish(add(engine, prompt(1000), b))
        engine.settle()
        engine.core.reset_prefix_cache()
        store.gate.clear()
        first = add(engine, *requests[0])
        engine.until(lambda: engine.restoration(first))
        others = [add(engine, *request) for request in requests[1:]]
        engine.until(lambda: engine.internal(others[0]).num_computed_tokens)
        store.gate.set()
        assert engine.finish(first, *others) == expected
        engine.settle()
        assert engine.report().loaded_tokens == 896
        engine.assert_nothing_leaked()


def test_what_vllm_computes_wrongly_beside_an_adapter_is_not_saved(
    model: Path, plain: dict[int, list[int]], tmp_path: Path
) -> None:
    """On CPUs, vLLM 0.32 gives a request without an adapter that of another in the same step."""
    from vllm.lora.request import LoRARequest

    store = scripted("mixed")
    options = {"store": "scripted://mixed", "mode": "load"}
    with closing(TinyEngine(model, options, enable_lora=True, max_loras=1, max_lora_rank=8)) as engine:
        adapter = LoRARequest("a", 1, str(save_adapter(tmp_path / "a", 1)))
        other = engine.add(prompt(20), sampling(300), lora_request=adapter)
        engine.until(lambda: other in engine.outputs)
        beside = engine.run(prompt(1000))
        engine.llm.llm_engine.abort_request([other])
        engine.settle()
        assert len(list(store)) == (7 if beside == plain[1000] else 0)
        # What is shared within vLLM is as wrong as before, and so is what is computed behind it.
        engine.run([*prompt(1000), *prompt(200, seed=2)])
        engine.settle()
        assert len(list(store)) == (9 if beside == plain[1000] else 0)
        for _ in range(2):
            assert engine.core.reset_prefix_cache()
            assert engine.run(prompt(1000)) == plain[1000]
            engine.settle()
        assert engine.report().loaded_tokens == 896
        engine.assert_nothing_leaked()
