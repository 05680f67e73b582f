"""cakekv store: the commands that look after stores, one file for each group of them."""

from __future__ import annotations

import typer

from cakekv.cli.store import archive, clean, copy, explain, learn, look, verify, warm

app = typer.Typer(
    no_args_is_help=True,
    help="Look into a store: what it holds, whether it is sound; clean it, copy it, move it.\n\n"
    "A store is a folder, or a URL such as file:///var/cache/kv, redis://host or tiered:///path/kv.toml.",
)
for command in (
    look.stats,
    look.ls,
    explain.explain,
    verify.verify,
    verify.repair,
    clean.rm,
    clean.gc,
    copy.cp,
    copy.migrate,
    warm.warm,
    learn.learn,
    archive.export,
):
    app.command()(command)
app.command("import")(archive.import_)
