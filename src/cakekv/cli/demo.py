"""cakekv demo"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cakekv.cli.console import NEWS, RESULTS, print_json, write_json, write_text
from cakekv.demo.document import DEMO_TOKENS, QUESTION, count_tokens, document_prompt, read_document
from cakekv.errors import CakeError
from cakekv.quantities import format_bytes

FILES = ("demo.json", "demo.png", "trace.json")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results and the store.")] = Path("out"),
    tokens: Annotated[int, typer.Option(min=1000, help="Length of the document, in tokens.")] = DEMO_TOKENS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Answer a question about a long document three ways, and compare.

    A small model (SmolLM2-135M-Instruct) reads 7,000 tokens of Python's language reference and answers a question
    about it: once computing everything (compute), once loading everything from disk (load), and once from both ends
    (both). The disk is slowed down to the bandwidth at which the first two take equally long on this machine: there,
    working from both ends should take about half as long.

    Writes demo.json, demo.png (the two frontiers over time) and trace.json (for ui.perfetto.dev) into the folder,
    and leaves the store there: try `cakekv store stats out/demo-store` afterwards.

    Examples:

        cakekv demo

        cakekv demo --tokens 2000 --out /tmp/demo
    """
    from cakekv.cli.model import load_cake
    from cakekv.demo.model import NAME
    from cakekv.demo.run import run_demo
    from cakekv.report.picture import frontier_picture
    from cakekv.report.progress import restore_bar
    from cakekv.report.table import modes_table
    from cakekv.report.trace import trace_json
    from cakekv.store.disk import DiskStore
    from cakekv.store.throttled import ThrottledStore

    with DiskStore(out / "demo-store") as disk:
        disk.delete([chunk.key for chunk in disk])
        link = ThrottledStore(disk, float("inf"))
        with load_cake("demo", link, save_answers=False) as cake:
            document = read_document("demo", cake.tokenizer, tokens)
            document_tokens = count_tokens(cake.tokenizer, document)
            NEWS.print(f"{NAME} reads {document_tokens:,} tokens and answers: {QUESTION}")
            prompt = document_prompt(cake.tokenizer, document, QUESTION)
            result = run_demo(cake, link, prompt, partial(restore_bar, NEWS))

    data = {"model": NAME, "document_tokens": document_tokens, "question": QUESTION, **result.to_dict()}
    title = f"{NAME}, {len(prompt):,} tokens, disk at {format_bytes(round(result.bandwidth))}/s"
    write_json(out / FILES[0], data)
    frontier_picture(result.reports, out / FILES[1], title)
    write_text(out / FILES[2], trace_json(result.reports))
    if as_json:
        print_json(data)
    else:
        RESULTS.print(modes_table(result.reports, title))
        RESULTS.print(result.answers["both"].text.strip(), style="italic")
        same = "the same answer from all three" if result.identical else "the answers differ"
        RESULTS.print(same, style="green" if result.identical else "bold red")
        NEWS.print(f"written: {', '.join(str(out / name) for name in FILES)}", soft_wrap=True)
    if not result.identical:
        raise CakeError("the three modes gave different answers; see demo.json")
