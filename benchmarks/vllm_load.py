"""Under load: requests at random times, half of them with a stored prefix, for compute only, load only and Cake.

    python benchmarks/vllm_load.py --json benchmarks/vllm_load.json

Arrivals are Poisson at shares of the server's capacity, which is measured first: the rate at which plain vLLM works off
the same requests when all of them are waiting. Plain vLLM computes everything; the other two are modes of the plug-in,
one after the other on one server. All get the same requests at the same times.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.vllm.asking import Answer, PlannedRequest, Texts, ask_at
from cakekv.bench.vllm.contest import Contest
from cakekv.cli.console import NEWS, number_list, write_json


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/vllm_load.json"),
    model: Annotated[Path | None, typer.Option(help="The model's folder; by default the demo's.")] = None,
    minutes: Annotated[float, typer.Option(help="Length of each run.")] = 3.0,
    shares: Annotated[str, typer.Option(help="Loads, as shares of the capacity.")] = "0.5,0.7,0.9",
    bandwidth_ratio: Annotated[float, typer.Option(help="Bandwidth, in multiples of the balanced one.")] = 1.0,
    prefixes: Annotated[int, typer.Option(min=1, help="Different stored prefixes.")] = 8,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of each: a multiple of --chunk-tokens.")] = 2048,
    suffix: Annotated[int, typer.Option(min=1, help="Most tokens after a stored prefix.")] = 128,
    fresh: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt that has none.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 32,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 256,
    step_tokens: Annotated[int, typer.Option(min=1, help="vLLM's --max-num-batched-tokens.")] = 512,
    calibration_requests: Annotated[int, typer.Option(min=2, help="Requests to measure the capacity with.")] = 40,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 7,
    serve: Annotated[str, typer.Option(help="More of vLLM's command line.")] = "--enforce-eager --dtype bfloat16",
) -> None:
    """Measure a Poisson mix."""
    loads: list[float] = number_list(shares, float, "shares")
    contest = Contest(json_file, model, serve, step_tokens)
    rng = random.Random(seed)
    with ExitStack() as stack:
        plain = stack.enter_context(contest.server())
        texts = Texts(plain)
        stored = [texts.next(prefix) for _ in range(prefixes)]
        prompts = [[*head, 1] for head in stored]
        restoring = contest.restoring_server(texts, prompts, prefix, chunk_tokens, bandwidth_ratio)
        server, balanced = stack.enter_context(restoring)

        def plan(count: int, rate: float) -> list[PlannedRequest]:
            at_s = 0.0
            requests: list[PlannedRequest] = []
            for _ in range(count):
                at_s += rng.expovariate(rate) if rate else 0.0
                if rng.random() < 0.5:
                    prompt = rng.choice(stored) + texts.next(rng.randint(1, suffix))
                else:
                    prompt = texts.next(rng.randint(16, fresh))
                requests.append((at_s, prompt, rng.randint(1, tokens)))
            return requests

        waiting = plan(calibration_requests, 0.0)
        for asked in (plain, server):
            ask_at(asked, waiting)  # to warm up
        capacity = calibration_requests / max(answer.came_s[-1] - answer.asked_s for answer in ask_at(plain, waiting))
        NEWS.print(f"capacity: {capacity:.2f} requests/s", highlight=False, soft_wrap=True)
        about = {
            **describe_run(),
            "model": contest.model.name,
            "prefix_tokens": prefix,
            "capacity_requests_per_s": capacity,
            "balanced_bytes_per_s": balanced,
            "bandwidth_ratio": bandwidth_ratio,
        }
        points: list[dict[str, Any]] = []
        for share in loads:
            rate = share * capacity
            requests = plan(max(2, round(60 * minutes * rate)), rate)
            point: dict[str, Any] = {"share_of_capacity": share, "requests_per_s": rate, "requests": len(requests)}
            tokens_of: dict[str, list[list[int]]] = {}
            for name, asked, own in (
                ("plain", plain, {}),
                ("load", server, {"mode": "load"}),
                ("cake", server, {"mode": "auto"}),
            ):
                answers = ask_at(asked, requests, **own)
                point[name] = _figures(answers)
                tokens_of[name] = [answer.token_ids for answer in answers]
                NEWS.print(f"{share:g}: {name}: {point[name]}", highlight=False, soft_wrap=True)
            point["same_tokens"] = {
                name: sum(a == b for a, b in zip(tokens_of["plain"], found, strict=True)) / len(requests)
                for name, found in tokens_of.items()
            }
            better = min(point[name]["mean_ttft_s"] for name in ("plain", "load"))
            point["mean_ttft_of_better"] = better / point["cake"]["mean_ttft_s"]
            points.append(point)
            write_json(json_file, {**about, "points": points})


def _figures(answers: Sequence[Answer]) -> dict[str, float]:
    ttfts = [answer.ttft_s for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s] or [0.0]
    span_s = max(answer.came_s[-1] for answer in answers) - min(answer.asked_s for answer in answers)
    return {
        "mean_ttft_s": float(np.mean(ttfts)),
        "p99_ttft_s": float(np.percentile(ttfts, 99)),
        "mean_gap_s": float(np.mean(gaps)),
        "p99_gap_s": float(np.percentile(gaps, 99)),
        "tokens_per_s": sum(len(answer.token_ids) for answer in answers) / span_s,
    }


if __name__ == "__main__":
    typer.run(main)
