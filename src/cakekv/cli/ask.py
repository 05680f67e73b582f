"""cakekv ask"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cakekv.calibration import cache_folder
from cakekv.cli.console import NEWS, one_of, print_json, write_text
from cakekv.codec import CODECS
from cakekv.compress import METHODS
from cakekv.decode import SIGHTS
from cakekv.demo.document import DEMO_TOKENS, QUESTION, document_prompt, prompt_parts, read_document
from cakekv.errors import BadInput
from cakekv.messages import inert
from cakekv.prompt import Prompt
from cakekv.quantities import format_bytes, parse_bandwidth
from cakekv.restore.options import Mode
from cakekv.reuse import WAYS
from cakekv.store.opening import open_store
from cakekv.store.throttled import ThrottledStore

if TYPE_CHECKING:
    from cakekv.restore.report import RestoreReport
    from cakekv.results import OnProgress

DEFAULT_CAPACITY = "5GB"


def ask(
    question: Annotated[str | None, typer.Option(help="What to ask; for demo there is a question.")] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file, or demo for Python's language reference; may be given several times. [default: demo]"
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest document, in tokens; what is longer is cut. [default: 7000 for demo, else no limit]"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    store: Annotated[
        str | None,
        typer.Option(
            help=f"Where KV chunks are kept: a folder, or a URL. [default: ~/.cache/cakekv/store, {DEFAULT_CAPACITY}]"
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Which arms may work.")] = "auto",
    bandwidth: Annotated[
        str | None, typer.Option(help='Slow the store down for an experiment, such as "50MB/s" or "7Gbps".')
    ] = None,
    tenant: Annotated[str, typer.Option(help="Tenants never share chunks.")] = "",
    codec: Annotated[
        str,
        typer.Option(
            help=f'How chunks are encoded: {one_of(CODECS)}; with parameters "kivi:bits=2,window=128" (docs/codecs.md).'
        ),
    ] = "raw",
    reuse: Annotated[
        str | None,
        typer.Option(
            help=f"Reuse documents wherever they stand: {one_of(WAYS)}; with parameters epic:link=16 (docs/reuse.md). "
            "Answers are not exact then."
        ),
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(
            help=f"Keep fewer tokens: {one_of(METHODS)}; with parameters corm:window=64 (docs/compress.md). Answers "
            "are not exact then."
        ),
    ] = None,
    compress_front: Annotated[
        bool, typer.Option("--compress-front", help="With a --compress that acts at store: on what is computed, too.")
    ] = False,
    decode: Annotated[
        str | None,
        typer.Option(
            help=f"What an answer's tokens attend to: {one_of(SIGHTS)}; with parameters clusterkv:budget=512 "
            "(docs/decode.md). Answers are not exact then."
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            help="So many layers keep nothing, and share what others keep, as cakekv share calibrate found; or the "
            "file that it wrote (docs/decode.md). Answers are not exact then."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; above: sampled.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the restore's report here, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the two frontiers over time here, as PNG.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev here.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--explain", help="First print what is planned, and why it is computed or loaded.")
    ] = False,
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

        cakekv ask --document a.txt --document b.txt --reuse epic:link=16 --question "Who owes what?"
    """
    from cakekv.cli.model import load_cake
    from cakekv.report.picture import frontier_picture
    from cakekv.report.trace import trace_json

    documents = document or ["demo"]
    if question is None:
        if documents != ["demo"]:
            raise BadInput(f"what is to be asked about {' and '.join(documents)}? Give --question")
        question = QUESTION
    rate = parse_bandwidth(bandwidth) if bandwidth is not None else None
    with open_store(store or f"{cache_folder() / 'store'}?capacity={DEFAULT_CAPACITY}") as opened:
        tier = opened if rate is None else ThrottledStore(opened, rate)
        with load_cake(
            model,
            tier,
            tenant,
            codec,
            reuse=reuse,
            compress=compress,
            compress_front=compress_front,
            decode=decode,
            share=share,
        ) as cake:
            texts = [
                read_document(name, cake.tokenizer, DEMO_TOKENS if tokens is None and name == "demo" else tokens)
                for name in documents
            ]
            prompt: Prompt = (
                document_prompt(cake.tokenizer, texts[0], question)
                if len(texts) == 1 and reuse is None
                else prompt_parts(cake.tokenizer, texts, question)
            )
            if plan:
                for run in cake.plan(prompt, mode=mode):
                    NEWS.print(str(run))
            stream = partial(
                cake.stream,
                prompt,
                max_new_tokens=max_new_tokens,
                mode=mode,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
            )
            answer = _answer(mode, lambda on_progress: stream(on_progress=on_progress), aloud=not as_json)
            restored = cake.last_report
            assert restored is not None
            with NEWS.status("Saving what was computed …"):
                saved = cake.wait_saved()
    if saved.error:
        NEWS.print(f"warning: {saved.failed_chunks} chunks could not be saved: {saved.error}", style="yellow")
    for note in restored.notes:
        NEWS.print(note, style="yellow")
    if report is not None:
        write_text(report, restored.to_json(indent=2) + "\n")
    if trace is not None:
        write_text(trace, trace_json({mode: restored}))
    if picture is not None:
        frontier_picture({mode: restored}, picture)
    if as_json:
        print_json({"model": model, "mode": mode, "answer": answer, "report": restored.to_dict()})
    else:
        _summarize(restored)


def _answer(label: str, stream: Callable[[OnProgress], Iterator[str]], aloud: bool) -> str:
    """Collect an answer; `aloud` writes it to standard output as it comes."""
    from cakekv.report.progress import restore_bar

    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        if aloud:
            sys.stdout.write(inert(piece, line_breaks=True) if sys.stdout.isatty() else piece)
            sys.stdout.flush()

    with restore_bar(NEWS, label) as on_progress:  # until the first token
        answer = stream(on_progress)
        first = next(answer, "")
    say(first)
    for piece in answer:
        say(piece)
    if aloud:
        sys.stdout.write("\n")
    return "".join(pieces)


def _summarize(report: RestoreReport) -> None:
    from cakekv.report.table import modes_table

    NEWS.print(modes_table({report.mode: report}))
    if report.prompt_tokens < report.chunk_tokens:
        NEWS.print(
            f"The prompt is shorter than a chunk of {report.chunk_tokens:,} tokens: nothing of it is stored.",
            style="yellow",
        )
    if report.reused_tokens:
        again = f"; {report.blended_tokens:,} of them were computed again" if report.blended_tokens else ""
        NEWS.print(
            f"Not exact: {report.reused_tokens:,} tokens of documents were reused as they were computed by themselves "
            f"({report.reuse}){again}, and {report.after_lossy_tokens:,} were computed behind those, which is not "
            "saved.",
        )
    elif not report.exact:
        NEWS.print(
            f"Not exact: {report.lossy_share:.0%} of the prompt's keys and values were loaded as {report.codec} keeps "
            "them; what was computed behind those is not saved.",
        )
    if report.compress and not report.cache_bytes:
        NEWS.print(
            f"Chunks are stored without all of their rows ({report.compress}): {report.kept_share:.0%} of the prompt's "
            "cache is there."
        )
    elif report.compress or report.decode:
        does = f"keeps {report.kept_share:.0%} of the cache" if report.compress else "sees what it needs of the cache"
        NEWS.print(
            f"Not exact: the answer {does} ({report.compress or report.decode}), "
            f"{format_bytes(report.cache_bytes)}, chosen in {report.compress_s:.2f} s; it is not saved."
        )
    if report.acceptance is not None:
        NEWS.print(
            f"{report.drafted_tokens:,} tokens were drafted; {report.accepted_tokens:,} of them are in the answer "
            f"({report.acceptance:.0%} of those that it came to). A token read "
            f"{format_bytes(round(report.step_read_bytes or 0))} of keys and values."
        )
    for reason, tokens in report.miss_reasons().items():
        NEWS.print(f"{tokens:,} tokens were computed because: {reason}", style="dim")
