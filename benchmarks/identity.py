"""What it costs to know, for each request, what computes: no engine computes anything here.

    python benchmarks/identity.py --json benchmarks/identity.json

A model that has not changed is looked at (`TransformersEngine.state`), which happens before and after every span of a
prefill. Also how long it takes once something has changed: a weight that was written to, or training mode; and the
first look, which reads all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from cakekv.bench.machine import describe_run
from cakekv.cli.console import write_json
from cakekv.demo.model import NAME, demo_model
from cakekv.engine.transformers import TransformersEngine

MOST_MS = {"demo": 1.0, "300 tensors": 5.0}
"""Targets: milliseconds per look at an unchanged model."""


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    looks: Annotated[int, typer.Option(min=1, help="Looks at each model; medians count.")] = 500,
) -> None:
    models: dict[str, tuple[str, Callable[[], Any]]] = {
        "demo": (NAME, lambda: _demo()),
        "300 tensors": ("Llama, 33 layers of width 256", _of_300_tensors),
    }
    results = {}
    for name, (what, make) in models.items():
        result = results[name] = {"model": what, **_measure(make(), looks), "target_ms": MOST_MS[name]}
        met = "met" if result["look_ms"] <= MOST_MS[name] else "MISSED"
        print(
            f"{what}: {result['look_ms']:.3f} ms a look, {result['look_processor_ms']:.3f} ms of it computing; "
            f"target {met}: at most {MOST_MS[name]:g} ms"
        )
    if json_file is not None:
        write_json(json_file, {**describe_run(), "looks": looks, "models": results})


def _demo() -> Any:
    return TransformersEngine.from_pretrained(demo_model(), device="cpu").model


def _of_300_tensors() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=33,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


def _measure(model: Any, looks: int) -> dict[str, Any]:
    engine = TransformersEngine(model)
    first_ms = _ms(engine.state)
    unchanged = engine.state()
    times = [_ms(engine.state) for _ in range(looks)]
    began = thread_time()
    for _ in range(looks):
        engine.state()
    processor_ms = (thread_time() - began) / looks * 1e3
    assert engine.state() == unchanged
    weight = next(model.parameters())
    with torch.no_grad():
        weight.mul_(1.0)
    written_ms = _ms(engine.state)
    model.train()
    training_ms = _ms(engine.state)
    return {
        "tensors": sum(1 for _ in model.parameters()),
        "modules": sum(1 for _ in model.modules()),
        "first_ms": round(first_ms, 1),
        "look_ms": round(median(times), 4),
        "look_processor_ms": round(processor_ms, 4),
        "look_95_ms": round(sorted(times)[int(0.95 * len(times))], 4),
        "after_a_write_ms": round(written_ms, 1),
        "after_train_ms": round(training_ms, 1),
    }


def _ms(call: Callable[[], Any]) -> float:
    began = perf_counter()
    call()
    return (perf_counter() - began) * 1e3


if __name__ == "__main__":
    typer.run(main)
