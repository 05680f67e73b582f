"""What a step costs the scheduler's thread, with the plug-in and without it, when many requests wait or are restored.

    python benchmarks/vllm_steps.py --json benchmarks/vllm_steps.json

The scheduler runs alone: the model's part of a step is only said to have happened, loads come over a simulated link of
4 GB/s, and the clock is virtual. So what is measured is Python's work in `schedule()`, as CPU time of the thread, for
chunks of an 8B model (32 MiB for 256 tokens, blocks of 16).
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.machine import describe_run
from cakekv.cli.console import NEWS, write_json
from cakekv.keys import ChunkKey
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import TIERS, Tier

CHUNK_BYTES = 32 << 20
CHUNK_TOKENS = 256
BLOCK_TOKENS = 16
STEP_TOKENS = 2048
LINK = 4e9
"""Bytes per second."""
OWN_TOKENS = 512
"""At the end of every prompt, behind the prefix that is stored."""


class Scenario(NamedTuple):
    """Requests that come at once, beside others that generate already."""

    name: str
    requests: int
    tokens: int
    fit: int
    """How many of them the KV cache holds at a time."""
    decodes: int
    same_prefix: bool = False


SCENARIOS = (
    Scenario("500 of 32k, same prefix, 16 fit", 500, 32768, 16, 64, same_prefix=True),
    Scenario("100 of 32k, 16 fit", 100, 32768, 16, 64),
    Scenario("64 of 32k, all fit", 64, 32768, 64, 64),
    Scenario("16 of 128k, all fit", 16, 131072, 16, 64),
    Scenario("400 of 8k, all fit, no decodes", 400, 8192, 400, 0),
    Scenario("1000 of 2k, all fit, no decodes", 1000, 2048, 1000, 0),
    Scenario("1000 of 2k, same prefix, all fit, no decodes", 1000, 2048, 1000, 0, same_prefix=True),
)


class HoldsAll(MemoryStore):
    """A store without bytes that says of every chunk that it has it, unless told otherwise."""

    name = "simulated"
    parallel_reads = 8

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.asked = 0
        """Look-ups."""

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        self.asked += 1
        return [CHUNK_BYTES if self.full else None] * len(keys)


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._epoch = time.time() - self.now

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def time(self) -> float:
        """As `time.time`."""
        return self._epoch + self.now

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Let the plug-in's scheduler tell the time by it; what waits for stores does not."""
        from cakekv.vllm.scheduling import lookup

        replaced = []
        for name, module in list(sys.modules.items()):
            if name.startswith("cakekv.vllm.") and module is not lookup:
                for own, real in ((self.monotonic, time.monotonic), (self.time, time.time)):
                    if getattr(module, real.__name__, None) is real:
                        setattr(module, real.__name__, own)
                        replaced.append((module, real))
        try:
            yield
        finally:
            for module, real in replaced:
                setattr(module, real.__name__, real)


class SimulatedWorker:
    """Reads the ordered chunks in turn over one link that all reads share."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: list[Any] = []
        self._reading: dict[int, list[float]] = {}
        """By load: when it began, and bytes that are left."""

    def step(self, orders: Any, seconds: float) -> Any:
        """What a worker reports of a step that takes so long."""
        from cakekv.vllm.messages import LoadResult, StepReport, WorkerReport

        begun: list[tuple[int, float]] = []
        done: list[tuple[int, float, float, bool]] = []
        now = self._clock.now
        end = now + seconds
        for number in set(orders.cancels):
            if number in self._reading:
                done.append((number, self._reading.pop(number)[0], now, False))
            elif any(order.number == number for order in self._queue):
                self._queue = [order for order in self._queue if order.number != number]
                done.append((number, now, now, False))
        self._queue += orders.loads
        while True:
            while self._queue and len(self._reading) < orders.at_a_time[0]:
                number = self._queue.pop(0).number
                self._reading[number] = [now, float(CHUNK_BYTES)]
                begun.append((number, now))
            if not self._reading:
                break
            rate = LINK / len(self._reading)
            taken = min(min(left for _, left in self._reading.values()) / rate, end - now)
            now += taken
            for number, reading in list(self._reading.items()):
                reading[1] -= taken * rate
                if reading[1] <= 1e-3:
                    done.append((number, self._reading.pop(number)[0], now, True))
            if now >= end:
                break
        report = WorkerReport(orders.sequence)
        report.begun = {number: end - at for number, at in begun}
        report.ended = {
            number: LoadResult(placed, "", CHUNK_BYTES if placed else 0, end - began, end - ended, False)
            for number, began, ended, placed in done
        }
        return StepReport({0: report}) if begun or done or orders.answer else None


class LoneScheduler:
    """vLLM's scheduler, with or without the plug-in, over simulated workers.

    Parameters
    ----------
    folder : Path
        Where to put a model's configuration.
    scenario : Scenario
        How many tokens and blocks there are to be.
    plain : bool
        Whether it is vLLM's own.
    """

    def __init__(self, folder: Path, scenario: Scenario, plain: bool = False) -> None:
        os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ALLOW_LONG_MAX_MODEL_LEN="1", HF_HUB_OFFLINE="1")
        import torch
        from transformers import LlamaConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from cakekv.restore.costs import ComputeCost, ComputeShape
        from cakekv.vllm.messages import WorkerDescription
        from cakekv.vllm.scheduling.scheduler import CakeScheduler

        LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, vocab_size=512).save_pretrained(folder)
        self.clock, self.plain = Clock(), plain
        self.store = HoldsAll()
        self.times_s: list[float] = []
        """CPU seconds of `schedule()`, per step."""
        self._worker = SimulatedWorker(self.clock)
        TIERS["simulated"] = Tier(lambda location: self.store, {})
        options: dict[str, Any] = {
            "model": str(folder),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": scenario.tokens + 2048,
            "max_num_batched_tokens": STEP_TOKENS,
            "max_num_seqs": 1024,
            "enable_prefix_caching": True,
            "block_size": 128,
        }
        if not plain:
            options |= {
                "scheduler_cls": "cakekv.vllm.CakeScheduler",
                "kv_transfer_config": {
                    "kv_connector": "CakeConnector",
                    "kv_connector_module_path": "cakekv.vllm",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"store": "simulated://", "chunk_tokens": CHUNK_TOKENS},
                },
            }
        config = EngineArgs(**options).create_engine_config()
        config.cache_config.block_size = BLOCK_TOKENS  # that of GPUs, which a CPU build would not take as an option
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        blocks = scenario.fit * (scenario.tokens // BLOCK_TOKENS + 60) + 2000 + scenario.decodes * 40
        config.cache_config.num_gpu_blocks = blocks
        groups = [KVCacheGroupSpec(["layer"], spec)]
        init_none_hash(sha256_cbor)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256_cbor)
        self.scheduler: Any = (Scheduler if plain else CakeScheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        if not plain:
            worker = WorkerDescription(("0 of 1",), "x", CHUNK_BYTES, CHUNK_BYTES, (CHUNK_BYTES,))
            self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): worker})
            self.half = self.scheduler.connector.scheduler_half
            self.half.costs.cost = ComputeCost(ComputeShape(5e-3, 60e-6, 60e-6 / 20000), trusted=True)

    def add(self, name: str, tokens: Sequence[int], generated: int = 2000) -> str:
        """Send a request."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=generated, ignore_eos=True)
        params._all_stop_token_ids = set()
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=list(tokens),
                sampling_params=params,
                pooling_params=None,
                arrival_time=time.time() if self.plain else self.clock.time(),
                block_hasher=self._hasher,
            )
        )
        return name

    def answered(self) -> None:
        """Wait until the store has said of all requests what it has."""
        if not self.plain:
            while any(self.half.lookup.answer(name) is None for name in self.scheduler.requests):
                time.sleep(0.001)

    def step(self) -> Any:
        """One step of the engine; returns what was scheduled."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        with self.clock.ticking():
            began = time.thread_time()
            output = self.scheduler.schedule()
            self.times_s.append(time.thread_time() - began)
            seconds = max(2e-3, 0.02 + 60e-6 * output.total_num_scheduled_tokens)
            report = None if self.plain else self._worker.step(output.kv_connector_metadata, seconds)
            self.clock.now += seconds
            names = list(output.num_scheduled_tokens)
            requests = [self.scheduler.requests[name] for name in names]
            done = [request.num_computed_tokens >= request.num_tokens for request in requests]
            outcome = ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: number for number, name in enumerate(names)},
                sampled_token_ids=[[7] if generates else [] for generates in done],
                kv_connector_output=None if self.plain else KVConnectorOutput(kv_connector_worker_meta=report),
            )
            self.scheduler.update_from_output(output, outcome)
        return output

    def close(self) -> None:
        """End its threads."""
        if not self.plain:
            self.half.close()


def fill(lone: LoneScheduler, scenario: Scenario) -> None:
    """Have the decodes generate, then send the scenario's requests."""
    for number in range(scenario.decodes):
        lone.add(f"decode {number}", random.Random(number).choices(range(500), k=OWN_TOKENS), 100_000)
    lone.answered()
    while any(not request.output_token_ids for request in lone.scheduler.requests.values()):
        lone.step()
    lone.store.full = True
    stored = scenario.tokens - OWN_TOKENS
    shared = random.Random(-1).choices(range(500), k=stored)
    for number in range(scenario.requests):
        own = random.Random(1000 + number)
        prefix = shared if scenario.same_prefix else own.choices(range(500), k=stored)
        lone.add(f"request {number}", prefix + own.choices(range(500), k=OWN_TOKENS))
    lone.answered()
    lone.times_s.clear()


def step_times(scenario: Scenario, steps: int, plain: bool) -> list[float]:
    """CPU seconds of `schedule()` in the first steps after the requests have come."""
    with tempfile.TemporaryDirectory() as folder:
        lone = LoneScheduler(Path(folder), scenario, plain)
        fill(lone, scenario)
        gc.collect()
        gc.freeze()  # the requests' tokens are the benchmark's, not the scheduler's
        for _ in range(steps):
            lone.step()
        gc.unfreeze()
        lone.close()
        return lone.times_s


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/vllm_steps.json"),
    steps: Annotated[int, typer.Option(min=1, help="Steps per scenario.")] = 60,
    only: Annotated[str, typer.Option(help="Scenarios whose names contain this.")] = "",
) -> None:
    """Measure what steps cost the scheduler."""
    rows = []
    for scenario in SCENARIOS:
        if only in scenario.name:
            ours, plain = step_times(scenario, steps, plain=False), step_times(scenario, steps, plain=True)
            row = {
                "name": scenario.name,
                "median_ms": 1e3 * median(ours),
                "max_ms": 1e3 * max(ours),
                "plain_ms": 1e3 * median(plain),
                "plain_max_ms": 1e3 * max(plain),
            }
            rows.append(row)
            NEWS.print(
                f"{scenario.name}: {row['median_ms']:.2f} ms, at most {row['max_ms']:.1f}; "
                f"plain vLLM {row['plain_ms']:.2f}, at most {row['plain_max_ms']:.1f}",
                highlight=False,
                soft_wrap=True,
            )
    write_json(json_file, {**describe_run(), "steps": steps, "scenarios": rows})


if __name__ == "__main__":
    typer.run(main)
