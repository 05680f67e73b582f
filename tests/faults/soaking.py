"""Requests on a tiny model and a tiered store in which all sorts of things go wrong. Run in a process of its own."""

from __future__ import annotations

import gc
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.leaks import Sample, sample

FAULTS = "error:0.01,read.short:0.02,corrupt:0.02,vanish:0.02,slow:0.05,slow_s:2ms,hang:0.001,hang_s:400ms"
ROUNDS_PER_CAKE = 60
ROUNDS_PER_SAMPLE = 10


class Abort(Exception):
    """Somebody does not want the answer any more."""


def composition(folder: str, seed: int, round_: int) -> str:
    """The file of a tiered store: too small for everything, and not to be relied upon."""
    file = Path(folder, "kv.toml")
    file.write_text(f"""
        [[tier]]
        url = "memory://?capacity=400kB"
        [[tier]]
        url = "{folder}/faulty?capacity=1500kB&evict=keep_the_tail&faults=seed:{seed + round_},{FAULTS}"
        deadline = "100ms"
        [[tier]]
        url = "{folder}/slow?capacity=700kB&bandwidth=50MB/s"
        write = "back"
    """)
    return f"tiered://{file}"


def main(folder: str, rounds: int, seed: int) -> None:
    """Serve so many requests, sometimes three at once; print what happened."""
    import torch

    torch.set_num_threads(1)
    from cakekv.cake import Cake
    from tests.cake.conftest import CHUNK, engine

    model, choose, figures = engine.__wrapped__(), random.Random(seed), Counter[str]()  # type: ignore[attr-defined]
    prefixes = [[choose.randrange(211) for _ in range(10 * CHUNK)] for _ in range(5)]
    prompts = [
        prefix[: choose.choice([4, 8, 10]) * CHUNK]
        + [choose.randrange(211) for _ in range(choose.randint(1, 9 * CHUNK))]
        for prefix in prefixes * 3
    ]
    with Cake(model, chunk_tokens=CHUNK) as plain:
        expected = [plain.generate(prompt, max_new_tokens=3).token_ids for prompt in prompts]

    def ask(cake: Cake, number: int, aborted_after: int | None, mode: Any, save: bool) -> None:
        events = 0

        def on_progress(progress: Any) -> None:
            nonlocal events
            events += 1
            if events == aborted_after:
                raise Abort

        try:
            answer = cake.generate(prompts[number], max_new_tokens=3, mode=mode, save=save, on_progress=on_progress)
        except Abort:
            figures["aborted"] += 1
            return
        figures["answers"] += 1
        figures["wrong outputs"] += answer.token_ids != expected[number]
        figures["loaded tokens"] += answer.report.loaded_tokens
        figures["recomputed tokens"] += answer.report.recomputed_tokens
        for load in answer.report.loads:
            figures[f"loads {load.outcome.partition(':')[0]}"] += 1

    def some(cake: Cake) -> tuple[Cake, int, int | None, Any, bool]:
        aborted_after = choose.randrange(1, 12) if choose.random() < 0.15 else None
        mode = choose.choice(["auto", "both", "load"])
        return cake, choose.randrange(len(prompts)), aborted_after, mode, choose.random() < 0.9

    gc.freeze()  # what is there now stays, and need not be looked through for every sample
    samples: list[Sample] = []
    done = 0
    while done < rounds:
        figures["cakes"] += 1
        with Cake(model, store=composition(folder, seed, figures["cakes"]), chunk_tokens=CHUNK, deadline_s=0.5) as cake:
            for _ in range(ROUNDS_PER_CAKE):
                if choose.random() < 0.1:
                    with ThreadPoolExecutor(3) as pool:
                        list(pool.map(lambda given: ask(*given), [some(cake) for _ in range(3)]))
                else:
                    ask(*some(cake))
                if choose.random() < 0.05:
                    cake.wait_saved()
                done += 1
                if done % ROUNDS_PER_SAMPLE == 0:
                    samples.append(sample(done))
            saved = cake.wait_saved()
            figures["saved chunks"] += saved.saved_chunks
            figures["failed saves"] += saved.failed_chunks
            figures["evicted"] += sum(tier.evicted.chunks for tier in cake.tiers)
    print(json.dumps({"figures": figures, "samples": samples}))
