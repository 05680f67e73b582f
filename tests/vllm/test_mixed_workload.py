"""Nothing else that vLLM does may break: the same mixed workload to plain vLLM and to ours, with the same results."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import BLOCK, TinyEngine, closing, save_model
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from cakekv.demo.model import demo_model

VOCABULARY = 49152  # the tokenizer's, which structured output needs


def text(start: int, tokens: int) -> list[int]:
    """Token ids with repetitions, so that n-gram speculation finds something."""
    return [3 + (start * 7919 + position % 97 * 31 + position // 97) % 40000 for position in range(tokens)]


Request = tuple[list[int], SamplingParams]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def one_of() -> StructuredOutputsParams:
    return StructuredOutputsParams(choice=["yes", "no"])


def workload(speculative: bool) -> list[Request]:
    """One request of every kind, three of them with a prefix in common."""
    shared = text(1, 5 * BLOCK)
    bias = {} if speculative else {"logit_bias": {5: 3.0}}  # vLLM cannot do both
    number = StructuredOutputsParams(regex=r"[a-c]{3}-[0-9]{2}")
    return [
        (shared + text(2, 40), SamplingParams(**GREEDY)),
        (shared + text(3, 300), SamplingParams(**GREEDY, logprobs=3)),
        (shared + text(4, 1), SamplingParams(**GREEDY, n=1, stop_token_ids=[17])),
        (text(5, 4 * BLOCK), SamplingParams(**GREEDY)),  # exactly full chunks
        (text(6, 3 * BLOCK + 1), SamplingParams(**GREEDY, prompt_logprobs=2)),
        (text(7, 20), SamplingParams(**GREEDY)),  # too short for the store
        (text(9, 3 * BLOCK + 9), SamplingParams(temperature=0, max_tokens=8, structured_outputs=one_of())),
        (text(10, 2 * BLOCK + 70), SamplingParams(temperature=0, max_tokens=24, structured_outputs=number)),
        (text(11, 2 * BLOCK + 5), SamplingParams(**GREEDY, presence_penalty=0.5, repetition_penalty=1.2)),
        (text(12, 2 * BLOCK + 5), SamplingParams(**GREEDY, **bias, allowed_token_ids=list(range(3, 900)))),
    ]


def seeded(step_tokens: int, speculative: bool) -> list[Request]:
    """Requests that draw: in prompts of one step, since vLLM on CPUs dies of longer ones, also without the plug-in.

    (Its V1 runner rewinds the random generator after every part of a prompt, which CPU generators cannot do.)
    """
    length = min(3 * BLOCK + 50, step_tokens // 3 - 10)
    drawn: dict[str, Any] = {"temperature": 0.8, "max_tokens": 8, "ignore_eos": True}
    least = {} if speculative else {"min_p": 0.01}  # vLLM cannot do both
    return [
        (text(20, length), SamplingParams(**drawn, seed=11, n=3)),
        (text(21, length), SamplingParams(**drawn, seed=5, top_p=0.9, top_k=40, **least)),
    ]


def run(engine: TinyEngine) -> list[Any]:
    """Everything at once, twice; the second time with an empty prefix cache, so that what was saved is loaded."""
    config = engine.llm.llm_engine.vllm_config
    step_tokens, speculative = config.scheduler_config.max_num_batched_tokens, config.speculative_config is not None
    found = []
    for _ in range(2):
        ids = [engine.add(prompt, params) for prompt, params in workload(speculative)]
        engine.finish(*ids)
        for prompt, params in seeded(step_tokens, speculative):
            ids.append(engine.add(prompt, params))
            engine.finish(ids[-1])
        engine.settle()
        assert engine.llm.reset_prefix_cache()
        found.append([engine.outputs[request_id] for request_id in ids])
    return found


def tokens(outputs: Sequence[Any]) -> list[list[tuple[int, ...]]]:
    return [[tuple(output.token_ids) for output in request.outputs] for request in outputs]


def log_probabilities(outputs: Sequence[Any]) -> list[float]:
    """Those of the tokens generated, and of the prompts', where asked for."""
    found = []
    for request in outputs:
        positions = [*(request.prompt_logprobs or []), *(request.outputs[0].logprobs or [])]
        found += [one.logprob for position in positions if position for _, one in sorted(position.items())]
    return found


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "steps of 256 tokens, prefix caching": {"max_num_batched_tokens": 256, "enable_prefix_caching": True},
    "steps of 100 tokens, no prefix caching": {"max_num_batched_tokens": 100, "enable_prefix_caching": False},
    "long steps, few requests at a time": {
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 3,
        "enable_prefix_caching": True,
    },
    "n-gram speculation": {
        "enable_prefix_caching": True,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY)


@dataclass
class Findings:
    """What came out of an engine: plain data."""

    tokens: list[list[list[tuple[int, ...]]]]
    log_probabilities: list[list[float]]
    loaded_tokens: int


def find(model: Path, cake: dict[str, Any] | None, engine: dict[str, Any]) -> Findings:
    """Run the workload on an engine of its own."""
    with closing(TinyEngine(model, cake, **engine)) as started:
        found = run(started)
        loaded = sum(report.loaded_tokens for _, report in started.half.outcomes.latest) if cake else 0
        started.assert_nothing_leaked()
    return Findings([tokens(wave) for wave in found], [log_probabilities(wave) for wave in found], loaded)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_same_workload_gives_the_same(model: Path, tmp_path: Path, configuration: Any) -> None:
    engine = {"skip_tokenizer_init": False, "tokenizer": str(demo_model()), **CONFIGURATIONS[configuration]}
    cake = {"store": str(tmp_path / "store"), "mode": "both"}
    if "speculative_config" in engine:
        # After vLLM's speculation, no other engine starts in the same process.
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
            expected, ours = (processes.submit(find, model, option, engine).result() for option in (None, cake))
    else:
        expected, ours = (find(model, option, engine) for option in (None, cake))
    assert ours.loaded_tokens >= 8 * BLOCK
    for wave in range(2):
        assert ours.tokens[wave] == expected.tokens[wave]
        assert ours.log_probabilities[wave] == pytest.approx(expected.log_probabilities[wave], abs=1e-3)
    assert expected.tokens[0] == expected.tokens[1]  # else the workload itself would not be fit to compare
