"""TTFT of a prompt whose documents are stored, and stand anywhere in it, in vLLM: the plug-in beside plain vLLM.

    sudo .venv-vllm/bin/python benchmarks/vllm_reuse.py --json benchmarks/reuse.json      # Linux, with iproute2
    python benchmarks/vllm_reuse.py --json out/reuse.json --tiny                          # to try it; needs no root

The prompt is a beginning, then six documents of 512 tokens, then a question: no document is a prefix. Valkey on the far
side of a link that the kernel slows down holds what each document is as a prompt of its own. The bandwidth is the
balanced one, at which loading all documents takes as long as plain vLLM takes for the prompt. Plain vLLM is a server of
its own; both are asked in turn, with another question in every round, and the first round teaches the costs. Each time
is what a client sees, to the first token. *Agreement* is the share of greedily generated tokens that are the same.

The file's list `ttft` gets an entry for each `--link-tokens`, instead of those it had of this engine; all else in the
file stays. The plug-in has blocks of 32 tokens, the least on CPUs, as it loads whole blocks behind each link.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_run
from cakekv.bench.servers import valkey_behind
from cakekv.bench.ttft import write_ttft
from cakekv.bench.vllm.asking import Answer, Texts, ask
from cakekv.bench.vllm.contest import Contest
from cakekv.bench.vllm.filling import fill
from cakekv.bench.vllm.options import ChunkTokens, JsonFile, ModelFolder, Repeats, Serve, StepTokens
from cakekv.bench.vllm.server import Server
from cakekv.cli.console import NEWS, number_list
from cakekv.errors import CakeError
from cakekv.store.opening import open_store

ENGINE = "vllm"
BEGINNING_TOKENS, QUESTION_TOKENS = 40, 24
SHOWN_TOKENS = 32
"""Tokens of the answers that are compared."""
LOG = Path("out/vllm_reuse.log")


class Asked(NamedTuple):
    """A prompt without its question."""

    beginning: list[int]
    documents: list[list[int]]

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return [*self.beginning, *(token for document in self.documents for token in document)]

    @property
    def spans(self) -> list[list[int]]:
        """Where the documents begin and end."""
        found, at = [], len(self.beginning)
        for document in self.documents:
            found.append([at, at + len(document)])
            at += len(document)
        return found


def main(
    json_file: JsonFile,
    model: ModelFolder = None,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, help="Of each: a multiple of --chunk-tokens.")] = 512,
    links: Annotated[
        str, typer.Option("--link-tokens", help="Tokens of each that are linked; several in turn.")
    ] = "16",
    chunk_tokens: ChunkTokens = 128,
    block_size: Annotated[int, typer.Option(min=1, help="The plug-in's --block-size.")] = 32,
    step_tokens: StepTokens = 512,
    repeats: Repeats = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two short documents, one round, no link.")] = False,
    serve: Serve = "--enforce-eager --dtype float32",
) -> None:
    """Measure how soon vLLM answers about stored documents."""
    if tiny:
        documents, tokens, repeats = 2, 2 * chunk_tokens, 1
    wanted: list[int] = number_list(links, int, "link-tokens")
    contest = Contest(LOG, model, serve, step_tokens)
    with ExitStack() as stack:
        link = None if tiny else stack.enter_context(ShapedLink())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        url = f"{folder}/store" if link is None else f"{stack.enter_context(valkey_behind(link))}?timeout=60s"
        plain = stack.enter_context(contest.server())
        texts = Texts(plain)
        asked = Asked(texts.next(BEGINNING_TOKENS), [texts.next(tokens) for _ in range(documents)])
        questions = [texts.next(QUESTION_TOKENS) for _ in range(repeats + 1)]
        more = ["--block-size", str(block_size)]
        options = {"chunk_tokens": chunk_tokens, "store": url}
        with contest.server(options, more) as server:
            fill(server, texts, [[*document, document[0]] for document in asked.documents], tokens)
        with open_store(url) as store:
            held = store.stats().bytes
        ask(plain, [*asked.ids, *questions[0]])
        bandwidth = held / ask(plain, [*asked.ids, *questions[0]]).ttft_s
        if link is not None:
            link.set_bandwidth(bandwidth)
        points = []
        for tokens_linked in wanted:
            with contest.server({**options, "save": False}, more) as server:
                points.append(measure(plain, server, asked, questions, tokens_linked))
            NEWS.print(described(points[-1]), highlight=False, soft_wrap=True)
    settings = {
        "documents": documents,
        "tokens": tokens,
        "question_tokens": QUESTION_TOKENS,
        "chunk_tokens": chunk_tokens,
        "block_size": block_size,
        "step_tokens": step_tokens,
        "model": contest.model.name,
        "serve": serve,
        "link": "none" if link is None else "Valkey behind a link shaped by tc tbf",
        "bandwidth_bytes_per_s": None if link is None else bandwidth,
    }
    write_ttft(json_file, ENGINE, [{**point, **settings, **describe_run()} for point in points])


def measure(
    plain: Server, server: Server, asked: Asked, questions: Sequence[Sequence[int]], link_tokens: int
) -> dict[str, Any]:
    """Ask both servers every question; the first one counts for nothing.

    Raises
    ------
    CakeError
        Nothing was reused.
    """
    own: dict[str, Any] = {"documents": asked.spans, "link_tokens": link_tokens, "report": True}
    for mode in ("both", "load"):
        ask(server, [*asked.ids, *questions[0]], mode=mode, **own)
    rounds: list[tuple[Answer, Answer]] = []
    same = []
    for number, question in enumerate(questions):
        prompt = [*asked.ids, *question]
        turns = [lambda prompt=prompt: ask(plain, prompt), lambda prompt=prompt: ask(server, prompt, **own)]
        answers = [turn() for turn in (reversed(turns) if number % 2 else turns)]
        rounds.append((answers[1], answers[0]) if number % 2 else (answers[0], answers[1]))
        shown = [ask(plain, prompt, SHOWN_TOKENS), ask(server, prompt, SHOWN_TOKENS, **own)]
        same.append(sum(map(int.__eq__, shown[0].token_ids, shown[1].token_ids)) / SHOWN_TOKENS)
    reports = [reused.report or {} for _, reused in rounds[1:]]
    if not any(report.get("reused_tokens") for report in reports):
        raise CakeError(f"nothing was reused: {reports[0].get('notes')} {reports[0].get('misses')}; see {server.log}")
    compute_s = [computed.ttft_s for computed, _ in rounds[1:]]
    reuse_s = [reused.ttft_s for _, reused in rounds[1:]]
    return {
        "engine": ENGINE,
        "method": f"epic:link={link_tokens}",
        "compute_s": median(compute_s),
        "reuse_s": median(reuse_s),
        "ratio": median(reuse_s) / median(compute_s),
        "agreement": sum(same[1:]) / len(same[1:]),
        "prompt_tokens": len(asked.ids) + QUESTION_TOKENS,
        "repeats": {
            "compute_s": compute_s,
            "reuse_s": reuse_s,
            "agreement": same[1:],
            **{name: [report.get(name) for report in reports] for name in ("reused_tokens", "linked_tokens", "met_at")},
        },
    }


def described(point: dict[str, Any]) -> str:
    """In words."""
    return (
        f"{point['method']}: plain vLLM {point['compute_s']:.2f} s, with documents {point['reuse_s']:.2f} s "
        f"({point['ratio']:.2f} of it); {point['agreement']:.0%} of the greedy tokens agree"
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
