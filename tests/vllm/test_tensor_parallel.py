"""Two and three workers for real, in processes of their own; each loads and saves its share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import TinyEngine, closing, prompt, save_model

from cakekv.store.opening import open_store

_PROGRAM = """
import json, sys, time
from vllm import LLM, SamplingParams
from cakekv.store.opening import open_store

def main():
    model, ranks, options = sys.argv[1:]
    options = json.loads(options)
    ids = json.loads(sys.stdin.read())
    llm = LLM(model=model, tensor_parallel_size=int(ranks), skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=2048, max_num_batched_tokens=256, enable_prefix_caching=False,
        distributed_executor_backend="mp", scheduler_cls="cakekv.vllm.CakeScheduler",
        kv_transfer_config=dict(
            kv_connector="CakeConnector", kv_connector_module_path="cakekv.vllm", kv_role="kv_both",
            kv_connector_extra_config=dict(chunk_tokens=128) | options,
        ))
    for mode in ("compute", "load", "both", "other"):
        if mode == "other":
            ids, mode = ids[::-1], "compute"
        extra = {"kv_transfer_params": {"cakekv": {"mode": mode, "report": True}}}
        params = SamplingParams(max_tokens=6, min_tokens=6, temperature=0, detokenize=False, extra_args=extra)
        output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
        report = (output.kv_transfer_params or {}).get("cakekv")
        print("RESULT", json.dumps([mode, list(output.outputs[0].token_ids), report]), flush=True)
    with open_store(options["store"]) as store:  # the workers go on writing beside the engine
        while len(list(store)) < 2 * 7 * options["shards"]:
            time.sleep(0.01)

if __name__ == "__main__":
    main()
"""


_LAYERED = """
import json, sys, time
from pathlib import Path
from vllm import LLM, SamplingParams
from cakekv.store.opening import open_store
from cakekv.restore.costs import ComputeCost, ComputeShape, LoadCost, LoadFigures

def main():
    model, store = sys.argv[1:]
    ids = json.loads(sys.stdin.read())
    llm = LLM(model=model, tensor_parallel_size=2, skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=2048, max_num_batched_tokens=256,
        distributed_executor_backend="mp", scheduler_cls="cakekv.vllm.CakeScheduler",
        kv_transfer_config=dict(
            kv_connector="CakeConnector", kv_connector_module_path="cakekv.vllm", kv_role="kv_both",
            kv_connector_extra_config=dict(store=store + "?bandwidth=8MB/s", chunk_tokens=128, layered_finish=True),
        ))
    half = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler_half
    for what in ("compute", "layered", "damaged", "again"):
        if what == "layered":  # computing seems slow, so all is loaded but the suffix
            half.costs.cost = ComputeCost(ComputeShape(0.01, 0.01, 0.0), trusted=True)
            half.costs.observe = lambda *observed: None
            size = half.loads.chunk_bytes
            figures = LoadFigures(byte_s=0.1 / size, load_s=0.1, alone_s=0.1, load_bytes=size)
            half.loads.tiers = [each._replace(cost=LoadCost(each.depth, figures)) for each in half.loads.tiers]
        if what == "damaged":  # one worker's part of one chunk
            files = [file for file in sorted(Path(store).rglob("*")) if file.is_file()]
            file = [file for file in files if file.stat().st_size > 200_000][5]
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)
        if what != "again":  # that one is answered from the blocks of the one before
            llm.reset_prefix_cache()
        extra = {"kv_transfer_params": {"cakekv": {"mode": "auto", "report": True}}}
        params = SamplingParams(max_tokens=6, min_tokens=6, temperature=0, detokenize=False, extra_args=extra)
        output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
        report = (output.kv_transfer_params or {}).get("cakekv")
        print("RESULT", json.dumps([what, list(output.outputs[0].token_ids), report]), flush=True)
        with open_store(store) as files:  # the workers go on writing beside the engine
            while len(list(files)) < 2 * 7:
                time.sleep(0.01)

if __name__ == "__main__":
    main()
"""


def test_every_worker_waits_for_its_own_pieces(tmp_path: Path) -> None:
    # Each worker's part of a chunk is large enough to be cut in two.
    model = save_model(tmp_path / "model", heads=12, kv_heads=12, intermediate_size=384, vocab_size=576)
    ids = prompt(1000)
    with closing(TinyEngine(model)) as engine:
        expected = engine.run(ids)
    results, errors = run_program(_LAYERED, ids, "0", model, tmp_path / "store")
    reports = {what: report for what, tokens, report in results if tokens == expected}
    assert list(reports) == ["compute", "layered", "damaged", "again"], (results, errors)
    layered, damaged = reports["layered"], reports["damaged"]
    assert layered["loaded_tokens"] == 896
    assert not layered["notes"]
    assert any(load["group"] is not None for load in layered["loads"])
    assert layered["spans"][-1]["began_s"] < max(load["ended_s"] for load in layered["loads"])
    assert damaged["recomputed_tokens"] == 128
    assert damaged["computed_tokens"] + damaged["loaded_tokens"] == 1000


def run_program(
    program: str, ids: list[int], multiprocessing: str, *arguments: object
) -> tuple[list[tuple[str, list[int], dict[str, Any]]], str]:
    """What a program with workers of its own found, and the end of what it complained about."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        input=json.dumps(ids),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=200,
        check=False,
    )
    lines = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return lines, done.stderr[-5000:]


@pytest.mark.parametrize(
    ("ranks", "options"), [(2, {"shards": 2, "codec": "int8"}), (3, {"shards": 6})], ids=["coded", "raw"]
)
def test_engines_of_several_sizes_share_chunks(ranks: int, options: dict[str, Any], tmp_path: Path) -> None:
    """What one worker saved, several load; what those save, one loads."""
    model = save_model(
        tmp_path / "model", heads=6, kv_heads=6, intermediate_size=384, vocab_size=576
    )  # divisible by 64, 2 and 3
    ids, store = prompt(1000), tmp_path / "store"
    options |= {"store": str(store)}
    lossy = 896 if "codec" in options else 0

    def load(engine: TinyEngine, token_ids: list[int]) -> list[int]:
        engine.settle()
        engine.core.reset_prefix_cache()
        engine.set(mode="load")
        answer = engine.run(token_ids)
        engine.settle()
        assert (engine.report().loaded_tokens, engine.report().lossy_tokens) == (896, lossy)
        return answer

    with closing(TinyEngine(model, options)) as engine:
        computed, loaded = engine.run(ids), load(engine, ids)
        assert lossy or computed == loaded
    found, errors = run_program(_PROGRAM, ids, "1", model, ranks, json.dumps(options))
    assert [mode for mode, _, _ in found] == ["compute", "load", "both", "compute"], (found, errors)
    (_, first, _), (_, second, report), (_, _, both), (_, other, _) = found
    assert (first, second) == (computed, loaded)
    assert (report["loaded_tokens"], report["lossy_tokens"]) == (896, lossy)
    assert both["computed_tokens"] > 104
    assert both["computed_tokens"] + both["loaded_tokens"] == 1000
    with closing(open_store(str(store))) as files:
        assert len(list(files)) == 2 * 7 * options["shards"]
    if not lossy:
        with closing(TinyEngine(model, options)) as engine:
            assert load(engine, ids[::-1]) == other
