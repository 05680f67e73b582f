"""vLLM's own benchmark client, `vllm bench serve`: it makes the requests, sends them and says what they took."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from cakekv.bench.vllm.server import NAME, Server
from cakekv.errors import CakeError


def bench_serve(server: Server, dataset: Sequence[str], requests: int, at_once: int) -> dict[str, Any]:
    """Run `vllm bench serve` against a server; what it prints goes into the server's log.

    It runs in this process, because importing vLLM takes longer than many a run.

    Parameters
    ----------
    server : Server
        Who is asked.
    dataset : sequence of str
        The words of its command line that say what is asked.
    requests : int
        How many requests that makes.
    at_once : int
        How many are under way at a time.

    Returns
    -------
    dict
        What `--save-result` would save: `duration` in seconds, `mean_ttft_ms`, …

    Raises
    ------
    CakeError
        Not all requests were answered.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = ["--port", str(server.port), "--model", NAME, "--tokenizer", str(server.model), *dataset]
    words += ["--num-prompts", str(requests), "--max-concurrency", str(at_once), "--temperature", "0", "--ignore-eos"]
    with server.log.open("a") as log, redirect_stdout(log), redirect_stderr(log):
        result: dict[str, Any] = main(parser.parse_args([*words, "--disable-tqdm"]))
    gc.unfreeze()  # what it froze would never be freed
    if result["completed"] != requests or result["failed"]:
        raise CakeError(
            f"{result['completed']} of {requests} requests were answered, {result['failed']} failed; see {server.log}"
        )
    return result
