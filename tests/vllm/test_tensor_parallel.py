"""Two and three workers for real, in processes of their own; each loads and saves its share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_engine import VOCABULARY, TinyEngine, closing, prompt, save_model

from cakekv.store.opening import open_store

_PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    model, ranks, store = sys.argv[1:]
    ids = json.loads(sys.stdin.read())
    llm = LLM(model=model, tensor_parallel_size=int(ranks), skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=2048, max_num_batched_tokens=256, enable_prefix_caching=False,
        distributed_executor_backend="mp", scheduler_cls="cakekv.vllm.CakeScheduler",
        kv_transfer_config=dict(
            kv_connector="CakeConnector", kv_connector_module_path="cakekv.vllm", kv_role="kv_both",
            kv_connector_extra_config=dict(store=store, chunk_tokens=128),
        ))
    for mode in ("compute", "load", "both"):
        extra = {"kv_transfer_params": {"cakekv": {"mode": mode, "report": True}}}
        params = SamplingParams(max_tokens=6, min_tokens=6, temperature=0, detokenize=False, extra_args=extra)
        output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
        report = (output.kv_transfer_params or {}).get("cakekv")
        print("RESULT", json.dumps([mode, list(output.outputs[0].token_ids), report]), flush=True)
        import time
        time.sleep(1.0)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_worker_restores_its_share(ranks: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", heads=6, kv_heads=6, intermediate_size=384, vocab_size=VOCABULARY)
    ids = prompt(1000)
    with closing(TinyEngine(model)) as engine:
        expected = engine.run(ids)
    store = tmp_path / "store"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(model), str(ranks), str(store)],
        input=json.dumps(ids),
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    lines = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    reports = {mode: report for mode, tokens, report in lines if tokens == expected}
    assert list(reports) == ["compute", "load", "both"], (lines, done.stderr[-5000:])
    assert reports["load"]["loaded_tokens"] == 896
    assert reports["both"]["computed_tokens"] > 104
    assert reports["both"]["computed_tokens"] + reports["both"]["loaded_tokens"] == 1000
    with closing(open_store(str(store))) as files:
        chunks = list(files)
    assert len(chunks) == 7 * ranks
