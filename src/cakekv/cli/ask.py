"""cakekv ask"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cakekv.cli.console import NEWS, print_json, write_text
from cakekv.demo.document import DEMO_TOKENS, QUESTION, cut, document_prompt, read_document
from cakekv.quantities import parse_bandwidth
from cakekv.store.opening import open_store
from cakekv.store.throttled import ThrottledStore

if TYPE_CHECKING:
    from cakekv.cake import Cake
    from cakekv.restore.report import RestoreReport

DEFAULT_STORE = "~/.cache/cakekv/store?capacity=5GB"


class ModeChoice(StrEnum):
    """The planner's modes, for the command line."""

    AUTO = "auto"
    COMPUTE = "compute"
    LOAD = "load"
    BOTH = "both"


def ask(
    question: Annotated[str, typer.Option(help="What to ask about the document.")] = QUESTION,
    document: Annotated[str, typer.Option(help="A text file, or demo for Python's language reference.")] = "demo",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use the document's first so many tokens only. [default: 7000 of the demo's, else all]"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    store: Annotated[str, typer.Option(help="Where KV chunks are kept: a folder, or a URL.")] = DEFAULT_STORE,
    mode: Annotated[ModeChoice, typer.Option(help="Which arms may work.")] = ModeChoice.AUTO,
    bandwidth: Annotated[
        str | None, typer.Option(help='Slow the store down for an experiment, such as "50MB/s" or "7Gbps".')
    ] = None,
    tenant: Annotated[str, typer.Option(help="Tenants never share chunks.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; above: sampled.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the restore's report here, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the two frontiers over time here, as PNG.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and report as JSON.")] = False,
) -> None:
    """Ask a question about a document, restoring its KV cache from a store.

    The first question about a document computes its KV cache and saves it; later questions, by any process with the
    same model, load what of it is worth loading while computing the rest. The answer goes to standard output,
    everything else to standard error.

    Modes: compute loads nothing; load computes only what is not stored; both works from both ends; auto does too,
    but lets an arm that does not pay stay idle.

    Examples:

        cakekv ask

        cakekv ask --document notes.txt --question "Who was there?" --store /var/cache/kv

        cakekv ask --mode both --bandwidth 10MB/s --picture restore.png
    """
    from cakekv.cli.model import load_cake
    from cakekv.report.picture import frontier_picture
    from cakekv.report.trace import trace_json

    rate = parse_bandwidth(bandwidth) if bandwidth is not None else None
    text = read_document(document)
    with open_store(store) as opened:
        tier = opened if rate is None else ThrottledStore(opened, rate)
        with load_cake(model, tier, tenant) as cake:
            limit = DEMO_TOKENS if tokens is None and document == "demo" else tokens
            if limit is not None:
                text = cut(cake.tokenizer, text, limit)
            prompt = document_prompt(cake.tokenizer, text, question)
            sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
            answer = _answer(cake, prompt, mode.value, max_new_tokens, sampling, stream=not as_json)
            restored = cake.last_report
            assert restored is not None
            with NEWS.status("Saving what was computed …"):
                saved = cake.wait_saved()
    if saved.error:
        NEWS.print(f"warning: {saved.failed_chunks} chunks could not be saved: {saved.error}", style="yellow")
    for note in restored.notes:
        NEWS.print(note, style="yellow", markup=False, highlight=False)
    if report is not None:
        write_text(report, restored.to_json(indent=2) + "\n")
    if trace is not None:
        write_text(trace, trace_json({mode.value: restored}))
    if picture is not None:
        frontier_picture({mode.value: restored}, picture)
    if as_json:
        print_json({"model": model, "mode": mode.value, "answer": answer, "report": restored.to_dict()})
    else:
        _summarize(restored)


def _answer(
    cake: Cake, prompt: list[int], mode: str, max_new_tokens: int, sampling: dict[str, float | None], stream: bool
) -> str:
    from cakekv.report.progress import restore_bar

    pieces: list[str] = []
    with restore_bar(NEWS, mode) as on_progress:  # until the first token
        answer = cake.stream(prompt, mode=mode, max_new_tokens=max_new_tokens, on_progress=on_progress, **sampling)
        pieces += [first] if (first := next(answer, None)) is not None else []
    if stream:
        sys.stdout.write("".join(pieces))
    for piece in answer:
        pieces.append(piece)
        if stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if stream:
        sys.stdout.write("\n")
    return "".join(pieces)


def _summarize(report: RestoreReport) -> None:
    from cakekv.report.table import modes_table

    NEWS.print(modes_table({report.mode: report}))
    for reason, tokens in report.miss_reasons().items():
        NEWS.print(f"{tokens:,} tokens were computed because: {reason}", style="dim", highlight=False, markup=False)
