"""The command cakekv."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from cakekv import __version__, logs
from cakekv.cli import (
    ask,
    bench,
    codec,
    demo,
    less,
    quality,
    scbench,
    serve,
    share,
    simulate,
    simulate_cluster,
    simulate_retention,
    store,
    vllm_args,
)
from cakekv.cli.console import EXIT_FAILED, Commands
from cakekv.messages import inert, without_secrets

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(ask.ask)
app.command()(bench.bench)
app.command()(quality.quality)
app.command()(scbench.scbench)
app.command()(serve.serve)
app.command()(vllm_args.vllm_args)
app.add_typer(codec.app, name="codec")
app.add_typer(less.app, name="less")
app.add_typer(share.app, name="share")
app.add_typer(store.app, name="store")
simulate.app.command()(simulate_cluster.cluster)
simulate.app.command()(simulate_retention.retention)
app.add_typer(simulate.app, name="simulate")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cakekv {__version__}")
        raise typer.Exit


@app.callback()
def cakekv(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Restore a prompt's KV cache from both ends: compute the head, load the tail, meet in the middle.

    Start with `cakekv demo`. Then ask about a text of yours, twice: the second time the document's KV cache is restored
    from the store.

        cakekv ask --document notes.txt --question "What is this about?"

    Exit codes: 0 done, 1 failed, 2 the input was wrong, 130 interrupted.
    """
    # The libraries underneath draw bars and give advice of their own; ours say what there is to say.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logs.configure()


def main() -> None:
    """Run the command line."""
    try:
        app()
    except Exception:  # a fault of ours, whose traceback may hold anything
        sys.stderr.write(inert(without_secrets(traceback.format_exc()), line_breaks=True))
        sys.exit(EXIT_FAILED)
