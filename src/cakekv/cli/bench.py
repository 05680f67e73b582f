"""cakekv bench"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from cakekv.cli.console import NEWS, RESULTS, number_list, write_json
from cakekv.demo.document import read_document
from cakekv.errors import BadInput


def bench(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    picture: Annotated[Path | None, typer.Option(help="Draw TTFT over bandwidth here, as PNG.")] = None,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    document: Annotated[str, typer.Option(help="A text file, or demo for Python's language reference.")] = "demo",
    prefixes: Annotated[str, typer.Option(help="Lengths of the stored prefix, in tokens.")] = "1024,2048,4096,7168",
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")] = "0.25,0.5,1,2,4,8",
    repeats: Annotated[
        str, typer.Option(help="Runs of every mode at every bandwidth: one number, or one per prefix.")
    ] = "3",
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 32,
    folder: Annotated[Path | None, typer.Option(help="Make the store in here, on the disk to be measured.")] = None,
) -> None:
    """Measure compute, load and both side by side, over prefix lengths and bandwidths.

    The balanced bandwidth is that at which loading the prefix takes as long as computing it; it is measured first,
    per prefix. Beside the three modes stands the clairvoyant bound: what both could take if the arms met at the best
    point, with no granularity and no mistakes, computed from the same runs' measured times per span and per chunk.

    Results are written after every prefix, so that an interrupted bench leaves what it has. The default grid takes
    about half an hour on two cores.

    Examples:

        cakekv bench --json bench.json --picture bench.png

        cakekv bench --json quick.json --prefixes 1024 --ratios 0.5,1,2 --repeats 3
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cakekv.bench.grid import check_grid, measure_prefix, runs_per_prefix
    from cakekv.bench.machine import describe_run
    from cakekv.bench.picture import bench_picture
    from cakekv.cli.model import load_cake

    lengths: list[int] = number_list(prefixes, int, "prefix lengths")
    multiples: list[float] = number_list(ratios, float, "ratios")
    times: list[int] = number_list(repeats, int, "repeats")
    if len(times) not in (1, len(lengths)):
        raise BadInput(f"{len(times)} numbers of repeats for {len(lengths)} prefixes: give one, or one per prefix")
    times = times * len(lengths) if len(times) == 1 else times
    cake = load_cake(model, None)
    token_ids = [int(token) for token in cake.tokenizer(read_document(document, cake.tokenizer))["input_ids"]]
    check_grid(cake.engine, len(token_ids), lengths, suffix_tokens, cake.chunk_tokens)
    data: dict[str, Any] = {
        **describe_run(),
        "model": model,
        "suffix_tokens": suffix_tokens,
        "chunk_tokens": cake.chunk_tokens,
        "points": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=NEWS) as progress:
        task = progress.add_task("", total=sum(runs_per_prefix(multiples, count) for count in times))
        started = 0
        for prefix, count in zip(lengths, times, strict=True):

            def on_run(words: str, prefix: int = prefix) -> None:
                nonlocal started
                progress.update(task, description=f"{prefix:,} tokens: {words}", completed=started)
                started += 1

            with tempfile.TemporaryDirectory(prefix="cakekv-bench-", dir=folder) as scratch:
                points = measure_prefix(
                    cake.engine,
                    token_ids[: prefix + suffix_tokens],
                    prefix,
                    multiples,
                    count,
                    Path(scratch) / "store",
                    on_run,
                    chunk_tokens=cake.chunk_tokens,
                    max_span_tokens=cake.max_span_tokens,
                )
            data["points"] += [point.to_dict() for point in points]
            write_json(json_file, data)
        progress.update(task, description="done", completed=started)
    if picture is not None:
        bench_picture(data["points"], picture)
    RESULTS.print(_table(data["points"]))


def _table(points: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    for heading in ("prefix", "bandwidth", "compute", "load", "both", "bound", "of bound", "of better arm"):
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            f"{point['prefix_tokens']:,}",
            f"{point['bandwidth_ratio']:g}×",
            *(f"{point[name]:.2f} s" for name in ("compute_s", "load_s", "both_s", "bound_s")),
            *(f"{point[name]:.2f}" for name in ("both_of_bound", "both_of_better")),
        )
    return table
